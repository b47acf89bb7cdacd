"""``triptych demo``."""

from __future__ import annotations

from pathlib import Path

import click

from triptych.cli.console import Stages, quiet_libraries

WRONG_ANSWER_EXIT = 1


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder that receives the artifact and the picture.",
)
@click.option("--target", default="xnnpack", show_default=True, help="Who runs it: xnnpack, portable, eager.")
@click.option("--recipe", default="fp32", show_default=True, help="Number formats: fp32 or 8da4w.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the picture and the questions.")
@click.pass_context
def demo(context: click.Context, out: Path, target: str, recipe: str, seed: int) -> None:
    """Export the embedded model and ask it three questions about a picture it has never seen.

    Exits with 1 if an answer is wrong.
    """
    quiet_libraries()
    from triptych.demo.show import show

    with Stages() as stages:
        answers = show(out, target=target, recipe=recipe, seed=seed, report=stages)
    click.echo(f"picture:  {answers.picture}")
    for asked in answers.asked:
        verdict = "" if asked.answer == asked.expected else f"   WRONG, expected {asked.expected!r}"
        click.echo(f"question: {asked.question}")
        click.echo(f"answer:   {asked.answer}{verdict}")
        click.echo(
            f"          first token after {1000 * asked.seconds_to_first_token:.0f} ms, "
            f"then {asked.tokens_per_second:.0f} tokens/s"
        )
    click.echo(f"artifact: {answers.artifact}")
    if any(asked.answer != asked.expected for asked in answers.asked):
        context.exit(WRONG_ANSWER_EXIT)
