"""Whole artifacts against the user's eager model, on every target: outputs, state, greedy tokens."""

from pathlib import Path

import pytest

from triptych.compiler.model import Model
from triptych.errors import UsageError
from triptych.verification import VerifyReport, verify

IMAGE_TRACES = {"one image", "two images", "image in a later turn"}


def assert_parity(report: VerifyReport) -> None:
    problems = {trace.trace: (*trace.failures, *trace.unseen) for trace in report.traces}
    assert not {name: found for name, found in problems.items() if found}
    assert report.passed
    for trace in report.traces:
        assert trace.comparison.outputs
        assert trace.comparison.state, f"{trace.trace}: no state was compared"
        assert trace.comparison.kls


@pytest.mark.slow
def test_the_embedded_model_in_eager(demo_eager: Path, demo_model: Model) -> None:
    report = verify(demo_eager, demo_model, tokens=8)
    assert_parity(report)
    assert IMAGE_TRACES | {"chunked prefill, second turn"} <= {trace.trace for trace in report.traces}
    assert {len(trace.comparison.state) for trace in report.traces} == {2 * 4}


@pytest.mark.slow
def test_the_embedded_model_in_xnnpack(demo_xnnpack: Path, demo_model: Model) -> None:
    report = verify(demo_xnnpack, demo_model, tokens=16)
    assert_parity(report)
    assert {trace.trace for trace in report.traces} >= IMAGE_TRACES
    assert {len(trace.comparison.state) for trace in report.traces} == {2 * 4}


@pytest.mark.slow
def test_the_embedded_model_with_portable_kernels(demo_portable: Path, demo_model: Model) -> None:
    assert_parity(verify(demo_portable, demo_model, tokens=2, prompt_lengths=(1, 17)))


@pytest.mark.slow
@pytest.mark.parametrize("artifact", ["demo_quantized_eager", "demo_quantized_xnnpack"])
def test_the_embedded_model_in_8da4w(artifact: str, demo_model: Model, request: pytest.FixtureRequest) -> None:
    report = verify(request.getfixturevalue(artifact), demo_model, tokens=8)
    assert_parity(report)
    assert {trace.against for trace in report.traces} == {"8da4w"}
    assert 0 < report.kl_fp32 < 1, "4-bit weights cost something, and not everything"


@pytest.mark.slow
def test_a_bound_on_the_cost_of_quantization_is_held(demo_quantized_eager: Path, demo_model: Model) -> None:
    report = verify(demo_quantized_eager, demo_model, tokens=2, prompt_lengths=(1,), max_kl=1e-9)
    assert all(trace.passed for trace in report.traces)
    assert not report.passed


@pytest.mark.slow
def test_four_layers_of_smollm2_in_xnnpack(smollm2_cut_xnnpack: Path, smollm2_cut_model: Model) -> None:
    report = verify(smollm2_cut_xnnpack, smollm2_cut_model, tokens=16)
    assert_parity(report)
    lengths = {f"{kind}, prompt of {length}" for kind in ("text", "random ids") for length in (1, 17, 300)}
    assert lengths <= {trace.trace for trace in report.traces}


def test_a_model_of_another_vocabulary_is_refused(demo_eager: Path, smollm2_cut_model: Model) -> None:
    with pytest.raises(UsageError, match="give the model the artifact was made from"):
        verify(demo_eager, smollm2_cut_model)
