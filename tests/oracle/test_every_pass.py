"""Every built-in pass holds parity alone and together with the others, on the default model."""

from pathlib import Path

import pytest

from tests.oracle.every_pass import CACHED, ELSEWHERE, FULL, PROGRAM, SOURCE
from triptych.compiler import manager
from triptych.compiler.instruments import NumericCheck
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pipeline import as_pipeline
from triptych.compiler.program import Program
from triptych.compiler.registry import built_in_names
from triptych.compiler.stages import Source
from triptych.errors import PipelineError
from triptych.verification import verify

# Passes that are right to find nothing here, and why.
IDLE = {
    "deduplicate-weights": "no two weights are equal in float32",
    "expand-splits": "the model has no splits",
    "remove-dead-code": "capture drops dead code already",
}


def test_no_pass_is_left_out() -> None:
    names = built_in_names("triptych.passes")
    assert sorted({*SOURCE, *PROGRAM, *ELSEWHERE}) == sorted(names)


@pytest.mark.parametrize("name", SOURCE)
def test_a_source_pass_alone(name: str, demo_model: Model, demo_oracle: Oracle) -> None:
    check = NumericCheck(demo_oracle)
    result = Source(demo_model, instruments=(check,)).transform(SOURCE[name]).results[-1]
    assert result.name == name
    assert len(result.matches) == 4  # the decoder's layers
    assert all(report.passed for report in check.reports[name])


@pytest.mark.parametrize("name", PROGRAM)
def test_a_pass_on_the_program_alone(name: str, demo_program: Program, demo_oracle: Oracle) -> None:
    if name == "remove-dead-methods":  # nothing is compared of methods that are gone
        rewritten, _ = manager.run_program(demo_program, as_pipeline(f"capture,{PROGRAM[name]}").program)
        assert rewritten is not demo_program
        return
    check = NumericCheck(demo_oracle)
    _, results = manager.run_program(demo_program, as_pipeline(f"capture,{PROGRAM[name]}").program, instruments=[check])
    assert results[-1].name == name
    if name in IDLE:
        assert not results[-1].changed
        return
    assert results[-1].matches
    assert len(check.reports[name]) == len(demo_oracle.plans)
    assert all(report.passed for report in check.reports[name])


@pytest.mark.parametrize("pipeline", ["ring-kv-cache", "cond-attention"])
def test_source_passes_for_other_models_refuse_with_a_reason(pipeline: str, demo_model: Model) -> None:
    with pytest.raises(PipelineError, match=rf"{pipeline}.*(window|encoder_states)"):
        Source(demo_model).transform(pipeline)


@pytest.mark.parametrize(
    ("name", "reason"), [("merge-lora", "found no candidate"), ("merge-token-embedding", "encoder")]
)
def test_program_passes_for_other_models_refuse_with_a_reason(name: str, reason: str, demo_program: Program) -> None:
    with pytest.raises(PipelineError, match=rf"{name} matched nothing: .*{reason}"):
        manager.run_program(demo_program, as_pipeline(f"capture,{name}").program)


def test_all_in_one_pipeline(demo_program: Program, demo_oracle: Oracle) -> None:
    check = NumericCheck(demo_oracle)
    _, results = manager.run_program(demo_program, as_pipeline(f"capture,{FULL}").program, instruments=[check])
    for result in results:
        assert not result.changed or all(report.passed for report in check.reports[result.name])
    assert {result.name for result in results if not result.changed} <= set(IDLE)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["eager", "xnnpack"])
def test_all_in_one_artifact(target: str, demo_model: Model, tmp_path: Path) -> None:
    captured = Source(demo_model).transform(CACHED).capture().rewrite(f"{FULL},greedy-token")
    captured.lower(target).save(tmp_path / "artifact")
    report = verify(tmp_path / "artifact", demo_model, tokens=4)
    assert report.passed, [(one.trace, one.failures, one.unseen) for one in report.traces if not one.passed]
