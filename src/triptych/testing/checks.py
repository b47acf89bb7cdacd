"""Checking one pass: does it match where its author says, refuse with a reason, and change nothing that counts?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from typing import Final

from triptych.compiler.instruments import NumericCheck
from triptych.compiler.manager import PassResult, run_program
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle, TraceReport
from triptych.compiler.pass_kinds import GraphPass, Pass, ProgramPass, SourceTransform
from triptych.compiler.pipeline import Pipeline, PipelineLike, as_pipeline
from triptych.compiler.program import Program
from triptych.compiler.provenance import MADE_BY
from triptych.compiler.stages import Captured, Source
from triptych.compiler.trace_plans import make_plans, subject_of
from triptych.errors import PipelineError
from triptych.manifest import DynamicDim

DEFAULT_CONTEXT: Final = 128
TOKENS: Final = 3
PROMPT_LENGTHS: Final = (1, 9)


@dataclass(frozen=True)
class PassCheck:
    """What `check_pass` saw: the results of the two runs, the subjects around the first, the verdicts on its traces.

    `again` is None where the second run matched nothing and the manager said so.
    """

    result: PassResult
    again: PassResult | None
    before: Model | Program
    after: Model | Program
    traces: tuple[TraceReport, ...]


@lru_cache(maxsize=1)
def default_model(max_context: int = DEFAULT_CONTEXT) -> Model:
    """Return the embedded vision-language model, built for `max_context` positions."""
    from triptych.compiler.adapters.hugging_face import load

    with as_file(files("triptych.demo").joinpath("model")) as folder:
        return load(folder, max_context=max_context)


def check_pass(
    one: Pass,
    model: Model,
    *,
    after: PipelineLike = (),
    matches: int | Mapping[str, int],
    refuses: Mapping[str, str] | None = None,
    effect: Callable[[Program | Model, Program | Model], bool] | None = None,
    idempotent: bool = True,
    oracle: Oracle | None = None,
) -> PassCheck:
    """Run `one` on `model` and assert all that its author promises; raises `AssertionError` that says what fails.

    1. It matches as often as `matches` says: in all, or by method (methods left out must have no match).
    2. Each refusal in `refuses`, a regular expression for the place → one for the reason, was given.
    3. `effect(before, after)` is true.
    4. A second run matches nothing, unless `idempotent` is False.
    5. Every call carries a value, and those that the pass made a source line where the graph had lines; dynamic
       dimensions of inputs stay dynamic.
    6. The oracle holds, after each pass of `after` and after `one`: whole call traces against the eager `model`.

    Args:
        one: the pass.
        model: the user's model, which is also the reference; `default_model()` will do.
        after: the pipeline that runs before the pass; capture is put in for graph and program passes. For these
            the default is the static cache and the neutral attention operator.
        matches: see 1.
        refuses: see 2.
        effect: see 3. It gets programs, or models for a source transform.
        idempotent: see 4.
        oracle: the traces to hold; `default_oracle(model)` unless given. Give one to check several passes quickly.

    The manager's own checks (structure, immutability, uniformity, properties) and the oracle's are part of the run;
    the `VerificationError` they raise comes through as it is.
    """
    check = NumericCheck(oracle or default_oracle(model))
    source = _prepared(one, Source(model, instruments=(check,)), as_pipeline(after))
    before, changed, result = _run(one, source)
    _check_matches(one, result, matches)
    _check_refusals(one, result, refuses or {})
    if effect is not None and not effect(before, changed):
        raise AssertionError(f"{one.name} did not have the effect that was asked for")
    again = _second_run(one, changed) if idempotent else None
    if isinstance(before, Program) and isinstance(changed, Program):
        _check_nodes(one, before, changed)
        _check_dynamic_dims(one, before, changed)
    return PassCheck(result, again, before, changed, check.reports.get(one.name, ()))


def default_oracle(model: Model) -> Oracle:
    """Return an oracle over short conversations with `model`: two prompts, a second turn, images where it sees any."""
    lengths = [length for length in PROMPT_LENGTHS if length + TOKENS <= model.metadata.max_context]
    return Oracle(model, make_plans(subject_of(model), TOKENS, lengths))


def _prepared(one: Pass, source: Source, after: Pipeline) -> Source | Captured:
    if isinstance(one, SourceTransform):
        return source.transform(after)
    if after == Pipeline():
        after = as_pipeline("static-kv-cache,swap-sdpa,capture")
    return source.transform(after.source).capture().rewrite(after.program)


def _run(one: Pass, source: Source | Captured) -> tuple[Model | Program, Model | Program, PassResult]:
    if isinstance(source, Source):
        transformed = source.transform(one)
        return source.model, transformed.model, transformed.results[-1]
    rewritten = source.rewrite(one)
    return source.program, rewritten.program, rewritten.results[-1]


def _check_matches(one: Pass, result: PassResult, expected: int | Mapping[str, int]) -> None:
    if isinstance(expected, int):
        found: object = len(result.matches)
    else:
        found = dict(Counter(match.method or "" for match in result.matches))
        expected = {method: count for method, count in expected.items() if count}
    if found != expected:
        refused = "; ".join(map(str, result.refusals[:3])) or "nothing was refused"
        raise AssertionError(f"{one.name} matched {found}, expected {expected} ({refused})")


def _check_refusals(one: Pass, result: PassResult, expected: Mapping[str, str]) -> None:
    for place, reason in expected.items():
        given = [one.reason for one in result.refusals if re.search(place, one.where)]
        if not any(re.search(reason, text) for text in given):
            raise AssertionError(
                f"{one.name} was to refuse {place!r} because {reason!r}; it refused "
                f"{[f'{refusal.where}: {refusal.reason}' for refusal in result.refusals]}"
            )


def _second_run(one: Pass, changed: Model | Program) -> PassResult | None:
    try:
        if isinstance(changed, Model):
            again = Source(changed).transform(one).results[-1]
        else:
            assert isinstance(one, (GraphPass, ProgramPass))
            _, (again,) = run_program(changed, [one])
    except PipelineError as error:
        if "matched nothing" in str(error):
            return None
        raise
    if again.matches:
        raise AssertionError(
            f"{one.name} is not idempotent: a second run matches {[str(match) for match in again.matches[:3]]}; pass "
            "idempotent=False if that is meant"
        )
    return again


def _check_nodes(one: Pass, before: Program, after: Program) -> None:
    for name, method in after.methods.items():
        had_lines = name in before.methods and any(
            node.meta.get("stack_trace") for node in before.methods[name].exported.graph.nodes
        )
        for node in method.exported.graph.nodes:
            if node.op == "call_function" and "val" not in node.meta:
                raise AssertionError(f"{one.name} left {name}: {node.name} without a value (node.meta['val'])")
            made_here = node.op == "call_function" and node.meta.get(MADE_BY) == one.name
            if made_here and had_lines and not node.meta.get("stack_trace"):
                raise AssertionError(
                    f"{one.name} made {name}: {node.name} ({node.target}) without a source line; give editor.call "
                    "like=node, or use editor.inline"
                )


def _check_dynamic_dims(one: Pass, before: Program, after: Program) -> None:
    for name, method in after.methods.items():
        if name not in before.methods:
            continue
        for old, new in zip(before.methods[name].inputs, method.inputs, strict=False):
            lost = [dim.name for dim in old.shape if isinstance(dim, DynamicDim) and dim not in new.shape]
            if lost:
                raise AssertionError(f"{one.name} made {name}.{new.name} lose its dynamic dimension {', '.join(lost)}")
