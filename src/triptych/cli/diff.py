"""``triptych diff``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from triptych.cli.console import quiet_libraries
from triptych.errors import TriptychError, UsageError

if TYPE_CHECKING:
    from triptych.comparison import Change, Comparison

DIFFERENT_EXIT = 1
SHOWN_PER_SECTION = 20


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
@click.pass_context
def diff(context: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Compare FIRST and SECOND: two artifacts, two saved programs, or two .pte files.

    Exit code 0 where they are equal to the last byte, 1 where they differ, 2 where they cannot be compared.
    """
    quiet_libraries()
    from triptych.comparison import compare

    try:
        found = compare(first, second)
    except TriptychError as error:
        raise UsageError(str(error)) from error
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    elif found.equal:
        click.echo(f"equal: {first} and {second}")
    else:
        _show(found)
    if not found.equal:
        context.exit(DIFFERENT_EXIT)


def _show(found: Comparison) -> None:
    from triptych.comparison import SECTIONS

    click.echo(f"--- {found.first}\n+++ {found.second}")
    for section in SECTIONS:
        changes = found.section(section)
        if not changes:
            continue
        click.echo(f"{section}:")
        for change in changes[:SHOWN_PER_SECTION]:
            click.echo(f"  {_line(change)}")
        if len(changes) > SHOWN_PER_SECTION:
            click.echo(f"  … and {len(changes) - SHOWN_PER_SECTION} more; --json shows all")


def _line(change: Change) -> str:
    """One change: + for an item of the second only, - for one of the first only, ~ for another value."""
    if change.before is None or change.after is None:
        value = change.after if change.before is None else change.before
        return f"{'+' if change.before is None else '-'} {change.item}: {_text(value)}"
    delta = "" if change.delta is None else f" ({change.delta:+,})"
    return f"~ {change.item}: {_text(change.before)} → {_text(change.after)}{delta}"


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
