"""The whole SmolLM2-135M-Instruct: export, answer, parity. Slow; `make test-real` runs it."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

import triptych
from triptych.compiler.adapters.hugging_face import load
from triptych.compiler.model import Model
from triptych.compiler.targets.pte import read_pte
from triptych.inspection import inspect
from triptych.verification import verify

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

QUESTION = "What is the capital of Italy? Answer in one sentence."
CONTEXT = 512


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Model:
    return load(smollm2, max_context=CONTEXT)


# Each recipe is lowered once, on a worker of its own.
RECIPES = [pytest.param(recipe, marks=pytest.mark.xdist_group(recipe)) for recipe in ("fp32", "8da4w")]


@pytest.fixture(scope="module", params=RECIPES)
def xnnpack_artifact(request: pytest.FixtureRequest, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / f"xnnpack-{request.param}"
    return triptych.export(smollm2, out=out, target="xnnpack", recipe=request.param, max_context=CONTEXT).path


def test_run_answers_rome(xnnpack_artifact: Path) -> None:
    command = [sys.executable, "-m", "triptych", "run", str(xnnpack_artifact), "--prompt", QUESTION, "--json"]
    answer = subprocess.run([*command, "--max-new-tokens", "24"], capture_output=True, text=True, check=True)
    assert "Rome" in json.loads(answer.stdout)["text"]


def test_parity_over_64_tokens_on_xnnpack(xnnpack_artifact: Path, model: Model) -> None:
    report = verify(xnnpack_artifact, model, tokens=64)
    # A guard against garbage only: rounding weights that were 4-bit in another form costs 0.7 nats.
    assert report.kl_fp32 < (1e-6 if report.recipe == "fp32" else 1.5)
    assert {trace.trace for trace in report.traces} >= {f"text, prompt of {length}" for length in (1, 17, 300)}
    if report.recipe != "fp32":
        # Thirty layers of int8 activations carry each rounding on: here the mean is held, and not every value.
        assert fmean(kl for trace in report.traces for kl in trace.comparison.kls) < 0.2
        return
    failed = {trace.trace: (*trace.failures[:3], *trace.unseen) for trace in report.traces if not trace.passed}
    assert not failed


def test_prefill_and_decode_share_cache_and_weights_in_the_file(xnnpack_artifact: Path) -> None:
    file = read_pte(xnnpack_artifact / "model.pte")
    prefill, decode = file.methods["prefill"], file.methods["decode"]
    assert len(prefill.state) == 60
    assert prefill.state == decode.state
    assert prefill.weights == decode.weights
    assert inspect(xnnpack_artifact)["methods"]["decode"]["delegates"]


@pytest.mark.xdist_group("fp32")
@pytest.mark.parametrize(("target", "tokens", "lengths"), [("eager", 64, (1, 17, 300)), ("portable", 4, (1, 17))])
def test_parity_of_fp32(
    target: str, tokens: int, lengths: tuple[int, ...], smollm2: Path, model: Model, tmp_path: Path
) -> None:
    artifact = triptych.export(smollm2, out=tmp_path / target, target=target, max_context=CONTEXT)
    report = verify(artifact.path, model, tokens=tokens, prompt_lengths=lengths)
    failed = {trace.trace: (*trace.failures[:3], *trace.unseen) for trace in report.traces if not trace.passed}
    assert not failed
