"""The whole SmolLM2-135M-Instruct at fp32: export, answer, parity on three targets."""

from pathlib import Path

import pytest

import triptych
from tests.real.smollm2 import CONTEXT, assert_answers_rome, assert_methods_share_cache_and_weights, failures
from triptych.compiler.model import Model
from triptych.verification import verify

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def xnnpack_artifact(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "xnnpack-fp32"
    return triptych.export(smollm2, out=out, target="xnnpack", max_context=CONTEXT).path


def test_run_answers_rome(xnnpack_artifact: Path) -> None:
    assert_answers_rome(xnnpack_artifact)


def test_parity_over_64_tokens_on_xnnpack(xnnpack_artifact: Path, smollm2_model: Model) -> None:
    report = verify(xnnpack_artifact, smollm2_model, tokens=64)
    assert {trace.trace for trace in report.traces} >= {f"text, prompt of {length}" for length in (1, 17, 300)}
    assert not failures(report)
    assert report.kl_fp32 < 1e-6


def test_prefill_and_decode_share_cache_and_weights_in_the_file(xnnpack_artifact: Path) -> None:
    assert_methods_share_cache_and_weights(xnnpack_artifact)


@pytest.mark.parametrize(("target", "tokens", "lengths"), [("eager", 64, (1, 17, 300)), ("portable", 4, (1, 17))])
def test_parity_on_other_targets(
    target: str, tokens: int, lengths: tuple[int, ...], smollm2: Path, smollm2_model: Model, tmp_path: Path
) -> None:
    artifact = triptych.export(smollm2, out=tmp_path / target, target=target, max_context=CONTEXT)
    report = verify(artifact.path, smollm2_model, tokens=tokens, prompt_lengths=lengths)
    assert not failures(report)
