"""``triptych export``."""

from __future__ import annotations

from pathlib import Path

import click

from triptych.cli.console import Stages, quiet_libraries


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the artifact to write.")
@click.option("--target", default="xnnpack", show_default=True, help="Who runs it: xnnpack, portable, eager.")
@click.option("--recipe", default=None, help="Number formats: fp32 (the default) or 8da4w.")
@click.option(
    "--pipeline",
    default=None,
    help="Passes in order, such as 'static-kv-cache{max=512},swap-sdpa,capture,last-token-logits' (the default, "
    "with the context length put in).",
)
@click.option(
    "--max-context", type=int, default=None, help="Positions to build for. Default: the model's own, at most 2048."
)
@click.option("--abi", default=None, help="Contract of the entry points: triptych (the default) or executorch-llm.")
@click.option(
    "--cache",
    default=None,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder that keeps finished steps, so that the next export goes on where it first differs. Default: none.",
)
def export(
    model: Path,
    out: Path,
    target: str,
    recipe: str | None,
    pipeline: str | None,
    max_context: int | None,
    abi: str | None,
    cache: Path | None,
) -> None:
    """Compile MODEL, a Hugging Face checkpoint folder, into an artifact."""
    quiet_libraries()
    from triptych.api import export as run_export

    with Stages() as stages:
        artifact = run_export(
            model,
            out=out,
            target=target,
            recipe=recipe,
            pipeline=pipeline,
            max_context=max_context,
            abi=abi,
            cache=cache,
            progress=stages,
        )
    size = sum(record.bytes for record in artifact.manifest.files.values())
    click.echo(f"{artifact.path} ({artifact.manifest.target}, {artifact.manifest.recipe}, {size / 1e6:.1f} MB)")
