"""``triptych inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from triptych.cli.console import quiet_libraries


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--partition",
    "show_partition",
    is_flag=True,
    help="Show instead what runs outside of delegates, with the reason and the line of the model.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect(path: Path, show_partition: bool, as_json: bool) -> None:
    """Show what PATH holds: an artifact, a saved program, or a .pte file."""
    quiet_libraries()
    if show_partition:
        _partition(path, as_json=as_json)
        return
    from triptych.inspection import inspect as read

    content = read(path)
    if as_json:
        click.echo(json.dumps(content, indent=2))
        return
    click.echo(f"{content['kind']} {path}")
    for key in ("abi", "target", "recipe", "pipeline", "max_context", "vocab_size"):
        if key in content:
            click.echo(f"  {key.replace('_', ' ')}: {content[key]}")
    _show_methods(content["methods"])
    _show_state(content["state"])
    if "weights" in content:
        _show_weights(content["weights"])
    if "stored" in content:
        _show_stored(content["stored"])
    for name, size in content.get("files", {}).items():
        click.echo(f"  file {name}: {_size(size)}")


def _partition(path: Path, *, as_json: bool) -> None:
    from triptych.compiler.partition_explainer import Partition
    from triptych.manifest import Manifest

    Manifest.load(path).check_files(path)
    partition = Partition.load(path)
    if as_json:
        click.echo(partition.to_json(), nl=False)
        return
    click.echo(f"partition of {path} by target {partition.target}")
    for name, method in partition.methods.items():
        delegates = ", ".join(f"{count} {back_end}" for back_end, count in method.delegates.items())
        inside = f"{delegates}, operators in them {method.delegated_operators}" if delegates else "no delegate"
        click.echo(f"  method {name}: {inside}; kernel calls outside {method.outside_calls}")
        for one in method.outside:
            lines = f" [{', '.join(one.lines)}]" if one.lines else ""
            click.echo(f"    {one.count} {one.operator}: {one.reason}{lines}")


def _show_methods(methods: dict[str, dict[str, Any]]) -> None:
    for name, method in methods.items():
        engine = f" on {method['engine']}" if "engine" in method else ""
        click.echo(f"  method {name}{engine}")
        if "roles" in method:
            click.echo(f"    roles: {', '.join(method['roles'])}")
        for direction in ("inputs", "outputs"):
            for port in method.get(direction, ()):
                click.echo(f"    {direction[:-1]} {port}")
        if "delegates" in method:
            counts = ", ".join(f"{count} {backend}" for backend, count in method["delegates"].items())
            click.echo(f"    delegates: {counts or 'none'}")
            operators = ", ".join(f"{count} {name}" for name, count in method["undelegated_operators"].items())
            click.echo(f"    undelegated operators: {operators or 'none'}")


def _show_state(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        shape = f" {row['dtype']}{row['shape']} {row['layout']}" if "shape" in row else ""
        click.echo(f"  state {row['name']}{shape}")
        if "readers" in row:
            click.echo(f"    read by {', '.join(row['readers'])}; written by {', '.join(row['writers'])}")
        if "arena" in row:
            place = "one place in all methods" if row["one_place"] else "NOT shared: methods place it differently"
            click.echo(f"    arena {row['arena']}, offset {row['offset']}, {_size(row['nbytes'])}, {place}")


def _show_weights(weights: list[dict[str, Any]]) -> None:
    click.echo(f"  weights: {len(weights)}, {_size(sum(weight['bytes'] for weight in weights))}")
    for weight in weights:
        aliases = "".join(f" = {name}" for name in weight["aliases"])
        click.echo(
            f"    {weight['name']}{aliases}: {weight['dtype']}{weight['shape']}, used by {', '.join(weight['users'])}"
        )


def _show_stored(stored: list[dict[str, Any]]) -> None:
    """What the file holds, each entry once; ExecuTorch knows delegates' weights by a hash of their bytes."""
    total = sum(entry["bytes"] for entry in stored)
    shared = sum(entry["bytes"] for entry in stored if len(entry["users"]) > 1)
    click.echo(f"  stored in the file: {len(stored)} constants, {_size(total)}, of which methods share {_size(shared)}")


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 100_000 else f"{count} bytes"
