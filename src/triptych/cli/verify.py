"""``triptych verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from triptych.cli.console import Stages, quiet_libraries

if TYPE_CHECKING:
    from triptych.verification import VerifyReport

BEYOND_TOLERANCE_EXIT = 3


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--against", "model", required=True, type=click.Path(path_type=Path), help="The checkpoint it was made from."
)
@click.option("--tokens", type=int, default=16, show_default=True, help="Positions to decode after each prompt.")
@click.option("--max-kl", type=float, default=None, help="Bound on the mean KL from the fp32 model, in nats.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def verify(context: click.Context, folder: Path, model: Path, tokens: int, max_kl: float | None, as_json: bool) -> None:
    """Compare the artifact in DIR with the eager model, call by call; exit code 3 beyond tolerance.

    Every output and the final state are compared on real and on random inputs. A quantized artifact is held to
    the same recipe in eager, and its KL from the fp32 model is shown.
    """
    quiet_libraries()
    from triptych.compiler.adapters.hugging_face import load
    from triptych.manifest import Manifest
    from triptych.verification import verify as run_verify

    Manifest.load(folder)
    with Stages(enabled=not as_json) as stages:
        stages("load model")
        described = load(model)
        report = run_verify(folder, described, tokens=tokens, max_kl=max_kl, report=stages)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2))
    else:
        _show(report)
    if not report.passed:
        context.exit(BEYOND_TOLERANCE_EXIT)


def _show(report: VerifyReport) -> None:
    for one in report.traces:
        differences = one.comparison.outputs
        ties = sum(difference.near_tie for difference in differences)
        click.echo(
            f"{'ok  ' if one.passed else 'FAIL'} {one.trace} (against {one.against}): {len(differences)} outputs and "
            f"{len(one.comparison.state)} state rows, worst relative difference {one.comparison.worst_relative:.2g}, "
            f"KL at most {max(one.comparison.kls, default=0.0):.2g}, {ties} near ties"
        )
        for problem in (*one.failures[:5], *one.unseen):
            click.echo(f"       {problem}")
    bound = f" (bound {report.max_kl})" if report.max_kl is not None else ""
    click.echo(f"mean KL from the fp32 model: {report.kl_fp32:.3g} nats{bound}")
    click.echo("parity" if report.passed else "NO parity")
