"""The whole Gemma-3-270M at fp32 over 2,200 positions of real text: five layers of six see the last 512 only."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.compiler.wrong_windows import RingOneSlotOff, WindowOff, WrongWindow
from tests.real.gemma3 import CONTEXT, DECODED, PROMPT, WINDOW, judged, text_plan
from triptych.compiler.adapters.hugging_face import load
from triptych.compiler.attention import attention_calls
from triptych.compiler.instruments import judge
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES
from triptych.compiler.stages import Source

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

LAYERS = 18


@pytest.fixture(scope="module")
def model(gemma3: Path) -> Model:
    return load(gemma3, max_context=CONTEXT)


@pytest.fixture(scope="module")
def oracle(model: Model) -> Oracle:
    return Oracle(model, [text_plan(model)])


@pytest.fixture(scope="module", params=["static-kv-cache", "ring-kv-cache"])
def cached(model: Model, request: pytest.FixtureRequest) -> Source:
    """The model with one kind of cache; both targets and the wrong variants go on from it."""
    return Source(model).transform(request.param)


def test_five_layers_of_six_have_the_window(model: Model) -> None:
    calls = attention_calls(model, model.entry_points_with("prefill", "decode"))
    expected = [None if layer % 6 == 5 else WINDOW for layer in range(LAYERS)]
    assert [call.window for call in calls] == expected * 2
    assert not any(call.masked for call in calls)


def test_the_reference_reads_the_text(oracle: Oracle) -> None:
    """The converted weights are the model's: the perplexity of the last 200 positions is near 11."""
    (one,) = oracle.references
    losses = [
        F.cross_entropy(one.wanted.outputs[f"decode@{position}"], one.trace.tokens[position])
        for position in range(PROMPT + 1, CONTEXT)
    ]
    assert torch.stack(losses).mean().exp() < 15


@pytest.mark.parametrize("target", ["eager", "xnnpack"])
def test_parity_over_a_long_text(target: str, cached: Source, oracle: Oracle, tmp_path: Path) -> None:
    report = judged(oracle, cached, target, tmp_path / target)
    assert report.failures + report.unseen == ()
    logits = [one for one in report.comparison.outputs if one.kl is not None]
    assert len(logits) == 1 + DECODED
    assert max(report.comparison.kls) < 1e-6
    assert len(report.comparison.state) == 2 * LAYERS


def test_a_wrong_window_is_seen(cached: Source, oracle: Oracle) -> None:
    """The same comparison: with the window switched off, or the ring one slot off."""
    rings = cached.pipeline.source[0].name == "ring-kv-cache"
    wrong: WrongWindow = RingOneSlotOff() if rings else WindowOff()
    (report,) = judge(oracle, cached.transform(wrong).model)
    assert not report.passed
    by_label = {one.label: one for one in report.comparison.outputs}
    tolerance = DEFAULT_TOLERANCES["float32"]
    wrong_logits = [one for one in report.comparison.outputs if one.kl is not None and not one.within(tolerance)]
    assert len(wrong_logits) >= DECODED
    if not rings:
        assert by_label["prefill@2000"] in wrong_logits, "a ring is read from the second call on, a window in the first"
