"""`sink-kv-cache`: the model's own function while nothing is dropped, and afterwards the one it promises."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.compiler import tiny
from tests.passes import attentions
from tests.passes.lowered import assert_lowered_parity
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.stages import Source
from triptych.compiler.trace import Step
from triptych.compiler.trace_plans import TracePlan
from triptych.errors import PipelineError, VerificationError
from triptych.modules.operators import attention as operators
from triptych.passes.sink_kv_cache import SinkKVCachePass
from triptych.testing import check_pass, default_model

WINDOW, SINK = 6, 2
PASS = SinkKVCachePass(window=WINDOW, sink=SINK)
TEXT = f"sink-kv-cache{{window={WINDOW},sink={SINK}}}"


def masked_model() -> Model:
    """The eager model that masks as the cache does; its weights are those of the tiny model."""
    model = tiny.tiny(*(attentions.Banded(WINDOW, SINK) for _ in range(2)))
    model.module.load_state_dict(tiny.tiny().module.state_dict())
    return model


def oracle_of(model: Model, *steps: tuple[str, int]) -> Oracle:
    length = sum(count for _, count in steps)

    def tokens(seed: int) -> Tensor:
        return torch.randint(0, model.metadata.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))

    return Oracle(model, [TracePlan("one", tuple(Step(*step) for step in steps), tokens)])


LONG = (("prefill", 11), ("decode", 2), ("prefill", 7), ("decode", 4))


def test_a_short_conversation_is_the_models_own() -> None:
    short = oracle_of(tiny.tiny(), ("prefill", 5), ("decode", WINDOW + SINK - 5))
    check_pass(PASS, tiny.tiny(), matches=2, oracle=short)


def test_past_window_and_sink_it_is_another_function() -> None:
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(PASS, tiny.tiny(), matches=2, oracle=oracle_of(tiny.tiny(), *LONG))


@pytest.mark.parametrize(
    "steps", [LONG, (("prefill", 1), ("decode", 22)), (("prefill", 23), ("decode", 1)), (("prefill", 4),) * 6]
)
def test_it_is_the_function_of_a_model_that_masks_like_it(steps: tuple[tuple[str, int], ...]) -> None:
    check_pass(PASS, tiny.tiny(), matches=2, oracle=oracle_of(masked_model(), *steps))


def test_a_sink_one_short_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operators.ring_mask

    def wrong(start_pos: Tensor, length: int, slots: int, sink: int = 0) -> Tensor:
        mask = right(start_pos, length, slots, sink)
        mask[:, sink - 1] &= start_pos < 9
        return mask

    monkeypatch.setattr(operators, "ring_mask", wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(PASS, tiny.tiny(), matches=2, oracle=oracle_of(masked_model(), *LONG))


def test_it_is_the_same_after_lowering(tmp_path: Path) -> None:
    assert_lowered_parity(
        tiny.tiny(), f"{TEXT},swap-sdpa", "xnnpack", tmp_path, oracle=oracle_of(masked_model(), *LONG)
    )


def test_the_embedded_model_keeps_parity_while_nothing_is_dropped() -> None:
    model = default_model()
    check_pass(SinkKVCachePass(window=60), model, matches=4, oracle=oracle_of(model, ("prefill", 50), ("decode", 10)))


def test_rows_are_as_long_as_window_and_sink() -> None:
    program = tiny.captured(tiny.tiny(layers=1), TEXT).program
    prefix = "blocks.0.attention.routed_attention.cache"
    assert {name: (row.shape[1], row.layout) for name, row in program.state.items()} == {
        f"{prefix}.{part}_sink{SINK}": (WINDOW + SINK, "BRHD") for part in ("keys", "values")
    }


def test_a_sliding_layer_keeps_its_own_window() -> None:
    program = tiny.captured(tiny.tiny(attentions.Banded(5), tiny.TinyAttention()), TEXT).program
    assert {row.shape[1] for name, row in program.state.items() if name.startswith("blocks.0.")} == {5}
    assert {row.shape[1] for name, row in program.state.items() if name.startswith("blocks.1.")} == {WINDOW + SINK}


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("window=3,sink=4", "window is 3 and sink 4; expected 1 <= sink <= window"),
        ("window=3,sink=0", "window is 3 and sink 0; expected 1 <= sink <= window"),
        ("window=20,sink=4", r"20 \+ 4 positions, the context 24: nothing would be dropped; use static-kv-cache"),
        ("window=9,max=13", r"9 \+ 4 positions, the context 13"),
        ("window=9,max=25", "max is 25, the model allows 1 to 24"),
    ],
)
def test_impossible_sizes_are_refused(options: str, reason: str) -> None:
    with pytest.raises(PipelineError, match=f"sink-kv-cache: .*{reason}"):
        Source(tiny.tiny()).transform(f"sink-kv-cache{{{options}}}")


def test_the_window_must_be_given() -> None:
    with pytest.raises(PipelineError, match="needs the option window"):
        Source(tiny.tiny()).transform("sink-kv-cache")


def test_a_model_of_sliding_layers_is_refused() -> None:
    with pytest.raises(PipelineError, match="every layer has a sliding window of its own; use ring-kv-cache"):
        Source(tiny.tiny(attentions.Banded(5))).transform(TEXT)
