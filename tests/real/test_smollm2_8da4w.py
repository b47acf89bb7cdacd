"""The whole SmolLM2-135M-Instruct at 8da4w on XNNPACK: export, answer, parity with the same recipe in eager."""

from pathlib import Path
from statistics import fmean

import pytest

import triptych
from tests.real.smollm2 import CONTEXT, assert_answers_rome, assert_methods_share_cache_and_weights
from triptych.compiler.model import Model
from triptych.verification import verify

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def xnnpack_artifact(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "xnnpack-8da4w"
    return triptych.export(smollm2, out=out, target="xnnpack", recipe="8da4w", max_context=CONTEXT).path


def test_run_answers_rome(xnnpack_artifact: Path) -> None:
    assert_answers_rome(xnnpack_artifact)


def test_parity_over_64_tokens_on_xnnpack(xnnpack_artifact: Path, smollm2_model: Model) -> None:
    report = verify(xnnpack_artifact, smollm2_model, tokens=64)
    # A guard against garbage only: rounding weights that were 4-bit in another form costs 0.7 nats.
    assert report.kl_fp32 < 1.5
    assert {trace.trace for trace in report.traces} >= {f"text, prompt of {length}" for length in (1, 17, 300)}
    # Thirty layers of int8 activations carry each rounding on: here the mean is held, and not every value.
    assert fmean(kl for trace in report.traces for kl in trace.comparison.kls) < 0.2


def test_prefill_and_decode_share_cache_and_weights_in_the_file(xnnpack_artifact: Path) -> None:
    assert_methods_share_cache_and_weights(xnnpack_artifact)
