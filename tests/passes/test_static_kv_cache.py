"""`static-kv-cache` takes causal and sliding self-attention, refuses the rest with reasons, changes nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.compiler import tiny
from tests.passes import attentions
from tests.passes.lowered import assert_lowered_parity
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog
from triptych.compiler.stages import Source
from triptych.errors import PipelineError, VerificationError
from triptych.modules.attention import CachedAttention
from triptych.modules.kv_cache import StaticKVCache
from triptych.modules.routing import routed_handler
from triptych.passes.static_kv_cache import StaticKVCachePass
from triptych.testing import check_pass, default_model

REFUSED: dict[str, tuple[type[nn.Module], str]] = {
    "a mask of another kind": (attentions.Masked, "passes an explicit mask that .*; only causal and sliding attention"),
    "not causal": (attentions.NotCausal, r"is not causal \(is_causal=False\)"),
    "dropout": (attentions.Dropping, "uses dropout"),
    "two calls in one module": (attentions.Twice, "makes 2 attention calls in one prefill"),
    "cross-attention": (attentions.Cross, r"another length than its queries \(cross-attention\)"),
    "a batch": (attentions.Batched, "runs on batch size 2"),
}


def cached(source: Source) -> list[str]:
    return [
        name
        for name, module in source.model.module.named_modules()
        if isinstance(routed_handler(module), CachedAttention)
    ]


@pytest.mark.parametrize("layers", [1, 3])
def test_every_plain_causal_attention_gets_one_cache(layers: int) -> None:
    source = Source(tiny.tiny(layers=layers)).transform("static-kv-cache")
    names = [f"blocks.{index}.attention" for index in range(layers)]
    assert cached(source) == names
    assert [match.where for match in source.results[0].matches] == names
    assert not source.results[0].refusals


def test_it_adds_two_buffers_a_layer_and_changes_no_other_tensor() -> None:
    model = tiny.tiny()
    before = {name: id(tensor) for name, tensor in [*model.module.named_parameters(), *model.module.named_buffers()]}
    changed = Source(model).transform("static-kv-cache").model.module
    after = {name: id(tensor) for name, tensor in [*changed.named_parameters(), *changed.named_buffers()]}
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {
        f"blocks.{layer}.attention.routed_attention.cache.{part}" for layer in range(2) for part in ("keys", "values")
    }


@pytest.mark.parametrize(("attention", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_it_refuses(attention: type[nn.Module], reason: str) -> None:
    with pytest.raises(PipelineError, match=rf"static-kv-cache matched nothing: blocks\.0\.attention: .*{reason}"):
        Source(tiny.tiny(attention())).transform("static-kv-cache")


def test_a_model_without_attention_has_no_candidate() -> None:
    with pytest.raises(PipelineError, match="static-kv-cache matched nothing: it found no candidate"):
        Source(tiny.tiny(nn.Linear(tiny.WIDTH, tiny.WIDTH))).transform("static-kv-cache")


def test_a_second_run_has_nothing_left_to_do() -> None:
    with pytest.raises(PipelineError, match="static-kv-cache matched nothing"):
        Source(tiny.tiny(layers=1)).transform("static-kv-cache,static-kv-cache")


@pytest.mark.parametrize("slots", [1, 7, tiny.CONTEXT_LENGTH])
def test_max_is_the_number_of_slots_and_the_context(slots: int) -> None:
    program = tiny.captured(tiny.tiny(layers=1), f"static-kv-cache{{max={slots}}}").program
    assert {row.shape[1] for row in program.state.values()} == {slots}
    assert program.metadata.max_context == slots


@pytest.mark.parametrize("slots", [0, -3, tiny.CONTEXT_LENGTH + 1])
def test_an_impossible_max_is_refused_with_the_bounds(slots: int) -> None:
    with pytest.raises(PipelineError, match=f"max is {slots}, the model allows 1 to 24 positions"):
        Source(tiny.tiny(layers=1)).transform(f"static-kv-cache{{max={slots}}}")


def test_a_partly_cached_decoder_does_not_export_silently(tmp_path: Path) -> None:
    """Its uncached causal layer would see only the fresh position in decode: a wrong program, not a slow one."""
    model = tiny.tiny(tiny.TinyAttention(), attentions.Masked())
    with pytest.raises(PipelineError, match=r"blocks\.1\.attention"):
        tiny.captured(model).rewrite("last-token-logits").lower("eager").save(tmp_path / "artifact")


def test_torchs_own_decoder_layer_gets_its_cache() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(tiny.WIDTH, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
            attended, _ = self.attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
            return attended

    source = Source(tiny.tiny(Layer())).transform("static-kv-cache")
    assert cached(source) == ["blocks.0.attention.attention"]


def test_the_embedded_model_caches_its_decoder_and_not_its_vision_tower(demo_model: object) -> None:
    source = Source(demo_model).transform("static-kv-cache")  # type: ignore[arg-type]
    names = cached(source)
    assert len(names) == 4
    assert all("language_model" in name and "vision" not in name for name in names)


# ------------------------------------------------------------------------------------------------ sliding layers

WINDOW = 5


def sliding_model() -> Model:
    """One layer with a window by an explicit mask, one with a causal mask, one with none."""
    plain = attentions.Banded(window=tiny.CONTEXT_LENGTH)
    return tiny.tiny(attentions.Banded(WINDOW), plain, tiny.TinyAttention())


def windows(source: Source) -> list[int | None]:
    caches = [module for module in source.model.module.modules() if isinstance(module, StaticKVCache)]
    return [cache.window for cache in caches]


def test_masks_are_read_and_windows_kept() -> None:
    source = Source(sliding_model()).transform("static-kv-cache")
    assert windows(source) == [WINDOW, None, None]
    assert {buffer.shape[1] for name, buffer in source.model.module.named_buffers()} == {tiny.CONTEXT_LENGTH}


def test_a_window_as_long_as_the_context_is_none() -> None:
    source = Source(sliding_model()).transform(f"static-kv-cache{{max={WINDOW}}}")
    assert windows(source) == [None, None, None]


@pytest.mark.parametrize("model", [sliding_model, tiny.tiny, default_model])
def test_it_keeps_parity(model: Callable[[], Model]) -> None:
    subject = model()
    check_pass(StaticKVCachePass(), subject, matches=4 if model is default_model else len(subject.module.blocks))


def test_sliding_attention_keeps_parity_after_lowering(tmp_path: Path) -> None:
    assert_lowered_parity(sliding_model(), "static-kv-cache,swap-sdpa", "xnnpack", tmp_path)


@pytest.mark.parametrize("error", [-1, 1])
def test_a_window_off_by_one_is_noticed(error: int) -> None:
    class Wrong(StaticKVCachePass):
        name: ClassVar[str] = "wrong-window"

        def transform(self, model: Model, log: MatchLog) -> Model:
            model = super().transform(model, log)
            for cache in model.module.modules():
                if isinstance(cache, StaticKVCache) and cache.window is not None:
                    cache.window += error
            return model

    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(Wrong(), sliding_model(), matches=3)
