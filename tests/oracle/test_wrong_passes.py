"""Ten wrong passes on the default model: each is caught by name, and bisection finds its method and its match."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import pytest
import torch

from tests.oracle import wrong_passes as wrong
from triptych.compiler import manager
from triptych.compiler.bisect import bisect
from triptych.compiler.instruments import NumericCheck, judge
from triptych.compiler.oracle import Oracle, first_failure
from triptych.compiler.pass_kinds import GraphPass
from triptych.compiler.pipeline import Pipeline, parse
from triptych.compiler.program import Program
from triptych.compiler.provenance import layer_of
from triptych.errors import VerificationError

aten = torch.ops.aten
THIRD: Final = "model.language_model.layers.2"
FIRST: Final = "model.language_model.layers.0"


@dataclass(frozen=True)
class Case:
    """A wrong pass, what is run before it, and the call it is wrong at: the `index`-th of `target` in a layer."""

    one: wrong.WrongOnce
    target: Any
    index: int = 0
    before: str = "expand-tanh-gelu"


CASES: Final = (
    Case(wrong.ComposePermutes("prefill", THIRD, 1), aten.transpose.int, 7),
    Case(wrong.MaskAsAddend("decode", THIRD), aten.scaled_dot_product_attention.default, before="legalize-aten"),
    Case(wrong.CountSlots("decode", THIRD), wrong.update_cache),
    Case(wrong.ReadThroughAlias("decode", THIRD), wrong.cached_sdpa),
    Case(wrong.ScaleQueries("decode", THIRD), wrong.cached_sdpa),
    Case(wrong.SpellOutNorm("prefill", FIRST), aten.rsqrt.default),
    Case(wrong.RoundTrip("decode", THIRD, 6), aten.linear.default, 6),
    Case(wrong.UntieWeights("decode", None, 1), aten.linear.default),
    Case(wrong.WriteLater("decode", THIRD), wrong.cached_sdpa),
)
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.one.name)


def pipeline_of(one: GraphPass | wrong.SplitState, before: str = "expand-tanh-gelu") -> Pipeline:
    """Put `one` between two passes that are right."""
    return Pipeline(program=(*parse(f"capture,{before}").program, one, *parse("capture,last-token-logits").program))


@by_name
def test_the_oracle_catches_it_by_name(case: Case, demo_program: Program, demo_oracle: Oracle) -> None:
    check = NumericCheck(demo_oracle)
    with pytest.raises(VerificationError, match=rf"^after pass {case.one.name} .*passes bisect"):
        manager.run_program(demo_program, pipeline_of(case.one, case.before).program, instruments=[check])
    assert all(report.passed for report in check.reports[case.before])


@by_name
def test_bisection_finds_pass_method_and_match(case: Case, demo_program: Program, demo_oracle: Oracle) -> None:
    pipeline = pipeline_of(case.one, case.before)
    culprit = bisect(demo_program, pipeline, demo_oracle)
    assert culprit is not None
    assert (culprit.step, culprit.index) == (case.one.name, 1)

    (method,) = (name for name, one in demo_program.methods.items() if case.one.role in map(str, one.roles))
    given, _ = manager.run_program(demo_program, pipeline.program[:1])
    calls = [node for node in given.methods[method].exported.graph.nodes if node.target is case.target]
    guilty = [node for node in calls if layer_of(node) == case.one.layer][case.index]
    assert culprit.method == method
    assert culprit.match is not None
    assert (culprit.match.where, culprit.match.layer, culprit.match.method) == (guilty.name, case.one.layer, method)


@by_name
def test_it_is_right_everywhere_else(case: Case, demo_program: Program, demo_oracle: Oracle) -> None:
    right = dataclasses.replace(case.one, role="")
    program, results = manager.run_program(demo_program, pipeline_of(right, case.before).program)
    assert len(results[1].matches) > 1
    assert first_failure(judge(demo_oracle, program)) is None


def test_a_pass_that_fires_in_prefill_only_is_no_uniform_pass(demo_program: Program, demo_oracle: Oracle) -> None:
    pipeline = pipeline_of(wrong.PrefillOnly())
    with pytest.raises(VerificationError, match=r"prefill-only is uniform .* 0 times .* in decode"):
        manager.run_program(demo_program, pipeline.program)
    culprit = bisect(demo_program, pipeline, demo_oracle)
    assert culprit is not None
    assert (culprit.step, culprit.method, culprit.match and culprit.match.where) == ("prefill-only", "decode", FIRST)


def test_state_that_a_pass_splits_is_no_state(demo_program: Program, demo_oracle: Oracle) -> None:
    pipeline = pipeline_of(wrong.SplitState())
    with pytest.raises(VerificationError, match=r"pass split-state broke the program: state .* is not one row"):
        manager.run_program(demo_program, pipeline.program)
    culprit = bisect(demo_program, pipeline, demo_oracle)
    assert culprit is not None
    assert (culprit.step, culprit.index) == ("split-state", 1)
    assert "is not one row" in culprit.reason


def test_a_lost_epsilon_in_a_deeper_layer_is_below_the_tolerance(demo_program: Program, demo_oracle: Oracle) -> None:
    """What the oracle cannot see: only in the first layer are values so small that 1e-6 beside their mean counts."""
    deep = wrong.SpellOutNorm("prefill", THIRD)
    program, _ = manager.run_program(demo_program, [deep])
    exact, _ = manager.run_program(demo_program, [dataclasses.replace(deep, role="")])
    worst = max(report.comparison.worst_relative for report in judge(demo_oracle, program))
    assert worst < 1e-5
    graphs = [one.methods["prefill"].exported.graph_module.code for one in (program, exact)]
    assert graphs[0] != graphs[1]
