"""Right passes raise no alarm: seven built-in ones and eight of our own, on the default model and a real one."""

import dataclasses
from typing import Final

import pytest

from tests.oracle.right_passes import RIGHT
from triptych.compiler import manager
from triptych.compiler.instruments import NumericCheck
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import GraphPass
from triptych.compiler.pipeline import parse
from triptych.compiler.program import Program
from triptych.compiler.stages import Source
from triptych.compiler.trace_plans import make_plans, subject_of

SOURCE: Final = "static-kv-cache,swap-sdpa"
ENDS: Final = (
    "last-token-logits,expand-tanh-gelu,legalize-aten",
    "expand-tanh-gelu,last-token-logits,legalize-executorch",
)


def assert_no_alarm(check: NumericCheck, *names: str) -> None:
    """Each pass was judged on every trace, and all of them passed."""
    assert set(check.reports) >= set(names)
    for name, reports in check.reports.items():
        assert len(reports) == len(check.oracle.plans), name
        assert all(report.passed for report in reports), name


@pytest.fixture(scope="session")
def demo_in_aten(demo_program: Program) -> Program:
    program, _ = manager.run_program(demo_program, parse("capture,legalize-aten").program)
    return program


def test_built_in_source_passes(demo_model: Model, demo_oracle: Oracle) -> None:
    check = NumericCheck(demo_oracle)
    Source(demo_model, instruments=(check,)).transform(SOURCE)
    assert_no_alarm(check, "static-kv-cache", "swap-sdpa")


@pytest.mark.parametrize("end", ENDS)
def test_built_in_passes_on_programs(end: str, demo_program: Program, demo_oracle: Oracle) -> None:
    check = NumericCheck(demo_oracle)
    manager.run_program(demo_program, parse(f"capture,{end}").program, instruments=[check])
    assert_no_alarm(check, *end.split(","))


@pytest.mark.slow
def test_built_in_passes_on_the_quantized_model(demo_model: Model, demo_oracle: Oracle) -> None:
    """From the quantizing pass on, the reference is the quantized model in eager."""
    check = NumericCheck(demo_oracle)
    captured = Source(demo_model, instruments=(check,)).quantize("8da4w").transform(SOURCE).capture()
    assert check.oracle.model is not demo_model
    assert "quantize" not in check.reports
    for end in ENDS:
        captured.rewrite(end)
    assert_no_alarm(check, *SOURCE.split(","), *ENDS[0].split(","), *ENDS[1].split(","))


@pytest.mark.parametrize("one", RIGHT, ids=lambda one: one.name)
def test_each_rewrite_of_our_own(one: GraphPass, demo_in_aten: Program, demo_oracle: Oracle) -> None:
    check = NumericCheck(demo_oracle)
    _, (result,) = manager.run_program(demo_in_aten, [one], instruments=[check])
    assert {match.method for match in result.matches} >= {"prefill", "decode"}
    assert_no_alarm(check, one.name)


def test_all_rewrites_one_after_the_other(demo_in_aten: Program, demo_oracle: Oracle) -> None:
    check = NumericCheck(demo_oracle)
    _, results = manager.run_program(demo_in_aten, RIGHT, instruments=[check])
    assert all(result.changed for result in results)
    assert_no_alarm(check, *(one.name for one in RIGHT))


@pytest.mark.slow
def test_all_rewrites_on_a_real_model_cut_short(smollm2_cut_model: Model) -> None:
    subject = dataclasses.replace(subject_of(smollm2_cut_model), max_context=64)
    check = NumericCheck(Oracle(smollm2_cut_model, make_plans(subject, tokens=3, prompt_lengths=(1, 9))))
    captured = Source(smollm2_cut_model, instruments=(check,)).transform(SOURCE).capture()
    captured.rewrite("last-token-logits,legalize-aten").rewrite(RIGHT)
    assert_no_alarm(check, *SOURCE.split(","), *(one.name for one in RIGHT))
