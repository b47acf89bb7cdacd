"""``triptych passes``: find, read, run and debug passes."""

from __future__ import annotations

import click

from triptych.cli.passes.catalogue import list_passes, show
from triptych.cli.passes.debugging import bisect, explain
from triptych.cli.passes.running import diff, run


@click.group()
def passes() -> None:
    """List, show, run, explain, bisect and compare passes."""


for command in (list_passes, show, run, explain, bisect, diff):
    passes.add_command(command)
