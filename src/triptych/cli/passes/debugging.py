"""``triptych passes explain`` and ``triptych passes bisect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from triptych.cli.console import Stages, quiet_libraries
from triptych.cli.passes.subject import load_model, load_oracle, model_folder, model_options
from triptych.errors import UsageError

if TYPE_CHECKING:
    from triptych.compiler.explain import Candidate
    from triptych.compiler.pass_kinds import Pass
    from triptych.compiler.pipeline import Pipeline
    from triptych.compiler.stages import Source

GUILTY_EXIT = 3
BEFORE_GRAPH_PASSES = "static-kv-cache,swap-sdpa,capture"


@click.command()
@click.argument("pass_text", metavar="PASS")
@model_options
@click.option(
    "--after",
    default=None,
    help=f'The pipeline before the pass; default: "{BEFORE_GRAPH_PASSES}" for passes that run after capture.',
)
@click.option("--method", default=None, help="Explain one method only.")
def explain(pass_text: str, model_path: Path | None, max_context: int, after: str | None, method: str | None) -> None:
    """Say for every candidate of PASS, such as "fold-rms-norm", whether it matches, and if not, why."""
    quiet_libraries()
    from triptych.compiler.explain import explanation_text
    from triptych.compiler.pass_kinds import SourceTransform
    from triptych.compiler.pipeline import Pipeline, as_pipeline
    from triptych.compiler.stages import Source

    passes = as_pipeline(pass_text).passes
    if len(passes) != 1:
        raise UsageError(
            f"'{pass_text}' is {len(passes)} passes; name the one to explain, and give the rest to --after"
        )
    (one,) = passes
    is_source = isinstance(one, SourceTransform)
    before = as_pipeline(after) if after else Pipeline() if is_source else as_pipeline(BEFORE_GRAPH_PASSES)
    if before.captures == is_source:
        raise UsageError(
            f"{one.name} runs {'before' if is_source else 'after'} capture, and --after '{before}' "
            f"{'captures' if before.captures else 'does not capture'}"
        )
    with Stages() as stages:
        stages("load model")
        source = Source(load_model(model_path, max_context), report=stages)
        candidates = _candidates(one, source, before, method)
    click.echo(explanation_text(one.name, candidates), nl=False)


def _candidates(one: Pass, source: Source, before: Pipeline, method: str | None) -> tuple[Candidate, ...]:
    from triptych.compiler.explain import explain as explain_graph_pass
    from triptych.compiler.explain import from_run
    from triptych.compiler.pass_kinds import GraphPass, MatchLog, ProgramPass, SourceTransform

    transformed = source.transform(before.source)
    log = MatchLog()
    if isinstance(one, SourceTransform):
        one.transform(transformed.model.with_own_modules(), log)
        return from_run(log.matches, log.refusals)
    program = transformed.capture().rewrite(before.program).program
    if method is not None and method not in program.methods:
        raise UsageError(f"no method is called {method!r}; the program has {', '.join(program.methods)}")
    if isinstance(one, ProgramPass):
        one.rewrite(program, log)
        return from_run(log.matches, log.refusals)
    assert isinstance(one, GraphPass)
    chosen = [name for name in program.methods if method in (None, name)]
    return tuple(found for name in chosen for found in explain_graph_pass(one, name, program.methods[name]))


@click.command()
@click.argument("pipeline")
@model_options
@click.option(
    "--tokens", type=click.IntRange(min=1), default=4, show_default=True, help="Tokens decoded by each trace."
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Write a reproducer into this folder.")
@click.option("--minimize", is_flag=True, help="Search on as few layers and as short a trace as still fail.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def bisect(
    context: click.Context,
    pipeline: str,
    model_path: Path | None,
    max_context: int,
    tokens: int,
    out: Path | None,
    minimize: bool,
    as_json: bool,
) -> None:
    """Find the first pass of PIPELINE that breaks parity, its method and its match; exit code 3 where one does."""
    quiet_libraries()
    from triptych.compiler.bisect import bisect as search
    from triptych.compiler.pipeline import parse
    from triptych.compiler.reproducer import minimize as minimized
    from triptych.compiler.reproducer import write_reproducer

    parsed = parse(pipeline)
    with Stages(enabled=not as_json) as stages:
        stages("load model")
        model = load_model(model_path, max_context)
        oracle = load_oracle(model, tokens)
        culprit = search(model, parsed, oracle, stages)
        if culprit is not None and minimize:
            model, culprit, oracle = minimized(model, parsed, culprit, oracle, stages)
    if culprit is not None and not as_json:
        click.echo(f"guilty: {culprit}")
    if culprit is not None and out is not None:
        with model_folder(model_path) as folder:
            write_reproducer(culprit, oracle, out, parsed, model_path=folder)
    if as_json:
        guilty = culprit and {
            "pass": culprit.step,
            "step": culprit.index + 1,
            "method": culprit.method,
            "match": culprit.match and culprit.match.where,
            "layer": culprit.match and culprit.match.layer,
            "line": culprit.match and culprit.match.line,
            "reason": culprit.reason,
        }
        click.echo(json.dumps({"guilty": guilty, "reproducer": str(out) if culprit and out else None}, indent=2))
    elif culprit is None:
        click.echo("nothing is guilty: parity holds after every pass")
    elif out is not None:
        click.echo(f"reproducer: python {out / 'reproduce.py'}")
    if culprit is not None:
        context.exit(GUILTY_EXIT)
