"""``triptych passes list`` and ``triptych passes show``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from triptych.cli.console import quiet_libraries
from triptych.errors import UsageError


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_passes(as_json: bool) -> None:
    """List every pass, built in or installed, with its kind and its rewrite in one line."""
    quiet_libraries()
    from triptych.catalogue import pass_info
    from triptych.compiler.registry import find_pass, pass_names

    infos = [pass_info(find_pass(name)) for name in pass_names()]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("pass", "kind", "does", "from"):
        table.add_column(column, overflow="fold")
    for info in infos:
        options = ",".join(f"{one.name}=…" for one in info.options)
        table.add_row(f"{info.name}{{{options}}}" if options else info.name, info.kind, info.summary, info.origin)
    Console().print(table)


@click.command()
@click.argument("name", required=False)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Write a page for every pass into DIR.")
def show(name: str | None, out: Path | None) -> None:
    """Show the page of the pass NAME: its rules, options and promises."""
    if (name is None) == (out is None):
        raise UsageError("name one pass to show, or give --out DIR for the pages of all")
    quiet_libraries()
    from triptych.catalogue import pass_info, pass_page
    from triptych.compiler.registry import find_pass, pass_names

    if name is not None:
        click.echo(pass_page(pass_info(find_pass(name))), nl=False)
        return
    assert out is not None
    out.mkdir(parents=True, exist_ok=True)
    for one in pass_names():
        (out / f"{one}.md").write_text(pass_page(pass_info(find_pass(one))), encoding="utf-8")
    click.echo(f"{len(pass_names())} pages in {out}")
