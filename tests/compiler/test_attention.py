"""Attention calls are found with the module that makes them, and their masks are read where a window can show."""

import dataclasses
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler.attention import AttentionCall, attention_calls, recorded_attention
from triptych.compiler.model import Model

WINDOW = 10
"""Longer than the 8 positions of an example input, shorter than the context."""


class Masked(tiny.TinyAttention):
    """Attention with an explicit mask, which `mask` makes."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return self.merge(F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask(x)))

    def mask(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def distance(length: int) -> Tensor:
    positions = torch.arange(length)
    return positions.unsqueeze(1) - positions


class Causal(Masked):
    def mask(self, x: Tensor) -> Tensor:
        return distance(x.shape[1]) >= 0


class Windowed(Masked):
    def mask(self, x: Tensor) -> Tensor:
        apart = distance(x.shape[1])
        return ((apart >= 0) & (apart < WINDOW)).unsqueeze(0)


class AdditiveWindow(Masked):
    def mask(self, x: Tensor) -> Tensor:
        apart = distance(x.shape[1])
        return torch.zeros(apart.shape).masked_fill((apart < 0) | (apart >= WINDOW), torch.finfo(torch.float32).min)


class OnePositionLess(Masked):
    def mask(self, x: Tensor) -> Tensor:
        apart = distance(x.shape[1])
        return (apart >= 0) & (apart < WINDOW - 1)


class Table(Masked):
    """Slices a mask over the whole context, kept as a buffer."""

    def __init__(self) -> None:
        super().__init__()
        apart = distance(tiny.CONTEXT_LENGTH)
        self.register_buffer("table", (apart >= 0) & (apart < WINDOW), persistent=False)

    def mask(self, x: Tensor) -> Tensor:
        return self.table[: x.shape[1], : x.shape[1]]


class LateHole(Masked):
    """Looks like a window until the context is nearly full."""

    def mask(self, x: Tensor) -> Tensor:
        apart = distance(x.shape[1])
        return (apart >= 0) & ((apart < WINDOW) | (apart >= tiny.CONTEXT_LENGTH - 2))


class Biased(Masked):
    def mask(self, x: Tensor) -> Tensor:
        apart = distance(x.shape[1])
        return (-0.25 * apart).masked_fill(apart < 0, float("-inf"))


class DataDependent(Masked):
    """Is a window of the length that the sign of the first value says."""

    def mask(self, x: Tensor) -> Tensor:
        apart = distance(x.shape[1])
        return (apart >= 0) & (apart < WINDOW + (x[0, 0, 0] > self.threshold))

    threshold = 0.0


class Padded(Masked):
    """Leaves out keys whose first feature is much larger than that of the query."""

    def mask(self, x: Tensor) -> Tensor:
        first = x[0, :, 0]
        return (distance(x.shape[1]) >= 0) & (first < first.unsqueeze(1) + 1.0)


class Elsewhere(nn.Module):
    """Windowed attention by torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(tiny.WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        apart = distance(x.shape[1])
        attended, _ = self.attention(x, x, x, attn_mask=(apart < 0) | (apart >= WINDOW), need_weights=False)
        return attended


def calls_of(*attentions: nn.Module, model: Model | None = None) -> list[AttentionCall]:
    model = model or tiny.tiny(*attentions)
    return attention_calls(model, model.entry_points_with("prefill", "decode"))


@pytest.mark.parametrize(
    ("attention", "window"),
    [
        (tiny.TinyAttention, None),
        (Causal, None),
        (Windowed, WINDOW),
        (AdditiveWindow, WINDOW),
        (OnePositionLess, WINDOW - 1),
        (Table, WINDOW),
    ],
)
def test_a_causal_mask_counts_as_causal_with_its_window(attention: type[nn.Module], window: int | None) -> None:
    prefill, decode = calls_of(attention())
    assert (prefill.entry_point, decode.entry_point) == ("prefill", "decode")
    assert (prefill.masked, prefill.causal, prefill.window) == (False, True, window)
    assert (decode.masked, decode.window) == (False, window), "one position shows no window of its own"
    assert prefill.owner == decode.owner == "blocks.0.attention"
    assert (prefill.query.shape[2], decode.query.shape[2]) == (8, 1)


def test_each_module_has_its_own_window() -> None:
    model = tiny.tiny(Windowed(), tiny.TinyAttention(), OnePositionLess())
    assert [call.window for call in calls_of(model=model)] == [WINDOW, None, WINDOW - 1] * 2


def test_torchs_own_attention_module_shows_its_window() -> None:
    prefill, decode = calls_of(Elsewhere())
    assert prefill.owner == "blocks.0.attention.attention"
    assert (prefill.masked, prefill.window, decode.window) == (False, WINDOW, WINDOW)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (LateHole, "lets query 10 attend to keys 1 to 10, and query 23 to 12 keys between 0 and 23"),
        (Biased, r"adds a bias to the scores \(-5.75 to -0.25\)"),
        (Padded, "lets query [0-9]+ attend to"),
    ],
)
def test_any_other_mask_stays_a_mask_with_its_reason(attention: type[nn.Module], reason: str) -> None:
    prefill, decode = calls_of(attention())
    for call in (prefill, decode):
        assert call.masked
        assert not call.causal
        assert call.window is None
        assert re.search(reason, call.mask_reason), call.mask_reason


def test_a_window_as_long_as_the_context_is_none() -> None:
    model = tiny.tiny(Windowed())
    short = dataclasses.replace(model, metadata=dataclasses.replace(model.metadata, max_context=WINDOW))
    assert [call.window for call in calls_of(model=short)] == [None, None]
    one_more = dataclasses.replace(model, metadata=dataclasses.replace(model.metadata, max_context=WINDOW + 1))
    assert [call.window for call in calls_of(model=one_more)] == [WINDOW, WINDOW]


def test_a_mask_that_is_a_window_for_each_input_but_another_one_is_refused() -> None:
    model = tiny.tiny(DataDependent())
    (attention,) = [module for module in model.module.modules() if isinstance(module, DataDependent)]
    firsts: list[float] = []
    handle = attention.register_forward_pre_hook(lambda _, inputs: firsts.append(float(inputs[0][0, 0, 0])))
    calls_of(model=model)
    handle.remove()
    _, full, other, *_ = firsts
    attention.threshold = (full + other) / 2
    prefill, decode = calls_of(model=model)
    assert prefill.mask_reason == decode.mask_reason == "changes with the inputs"
    attention.threshold = min(full, other) - 1
    assert [call.window for call in calls_of(model=model)] == [WINDOW + 1] * 2


def test_a_mask_at_some_lengths_only_is_refused() -> None:
    class Sometimes(tiny.TinyAttention):
        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.split(x)
            mask = distance(x.shape[1]) >= 0 if x.shape[1] <= 8 else None
            return self.merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))

    prefill, _ = calls_of(Sometimes())
    assert (prefill.masked, prefill.mask_reason) == (True, "is not there at every length")


def test_other_calls_in_a_longer_sequence_are_refused() -> None:
    class Shortcut(Windowed):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.shape[1] <= 8 else x

    prefill, _ = calls_of(Shortcut())
    assert (prefill.masked, prefill.mask_reason) == (True, "comes with other calls in a longer sequence")


def test_tokens_are_drawn_from_the_vocabulary_and_examples_are_kept() -> None:
    """An entry point over tokens: the longer runs must not look up a token that does not exist."""
    model = tiny.tiny(Windowed())
    decode = tiny.with_entry_point(model, "decode").entry_points[2]
    tokens = dataclasses.replace(decode.inputs[0], shape=(1, tiny.SEQUENCE))
    prompt = dataclasses.replace(decode, inputs=(tokens, decode.inputs[1]))
    seen: list[Tensor] = []
    handle = model.module.embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    (call,) = attention_calls(model, [prompt.resolved(tiny.CONTEXT_LENGTH)])
    assert call.window == WINDOW
    assert [one.shape[1] for one in seen] == [8, tiny.CONTEXT_LENGTH, tiny.CONTEXT_LENGTH - 1]
    assert all(int(one.min()) >= 0 and int(one.max()) < tiny.VOCABULARY for one in seen)
    assert len(seen[1].unique()) > 5
    seen.clear()
    given = dataclasses.replace(prompt, examples={"tokens": torch.tensor([[3, 7]])})
    (call,) = attention_calls(model, [given.resolved(tiny.CONTEXT_LENGTH)])
    handle.remove()
    assert call.window == WINDOW
    assert seen[1].flatten().tolist() == [3, 7] * 12


def test_a_model_without_masks_runs_once_an_entry_point() -> None:
    lengths: list[int] = []
    model = tiny.tiny()
    model.module.register_forward_hook(lambda *_: None)
    (block, _) = model.module.blocks  # type: ignore[misc]
    block.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    calls_of(model=model)
    assert lengths == [8, 1]


def test_the_longer_runs_stop_at_the_last_call_and_compute_no_attention() -> None:
    model = tiny.tiny(Windowed(), Windowed())
    module: Any = model.module
    lengths: list[int] = []
    module.head.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    calls_of(model=model)
    assert lengths == [8, 1], "the projection to the vocabulary is dear"
    assert all(torch.equal(before[name], buffer) for name, buffer in module.named_buffers())
    assert not module.blocks[0]._forward_pre_hooks


def test_recorded_calls_keep_the_mask_as_it_was_given() -> None:
    model = tiny.tiny(Windowed())
    tokens = torch.zeros(1, 12, dtype=torch.int64)
    with torch.no_grad(), recorded_attention(model.module) as calls:
        model.module(tokens)
    (call,) = calls
    assert (call.masked, call.causal, call.window) == (True, False, None)
    assert call.mask is not None
    assert call.mask.shape == (1, 12, 12)
