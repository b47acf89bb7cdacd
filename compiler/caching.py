"""Giving the causal self-attention of a decoder its key-value caches: what the cache passes have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from triptych.compiler.attention import AttentionCall, attention_calls
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog
from triptych.errors import PipelineError
from triptych.modules.attention import CachedAttention
from triptych.modules.cross_attention import CrossAttention
from triptych.modules.kv_cache import KVCache, StaticKVCache
from triptych.modules.routing import route_attention

Choose = Callable[[AttentionCall, int], KVCache]
"""(one call of a module, positions of the context) → the cache that the module gets."""


def with_context(model: Model, name: str, positions: int | None) -> Model:
    """Return `model` with a context of `positions`, its own where None; raises `PipelineError` past what it allows.

    `name` is the pass that asks.
    """
    limit = model.metadata.model_max_context
    chosen = model.metadata.max_context if positions is None else positions
    if not 1 <= chosen <= limit:
        raise PipelineError(f"{name}: max is {chosen}, the model allows 1 to {limit} positions")
    return dataclasses.replace(model, metadata=dataclasses.replace(model.metadata, max_context=chosen))


def cacheable_calls(model: Model, log: MatchLog, name: str) -> list[AttentionCall]:
    """Return one call of each module whose attention can be cached, with its sliding window; refuse the others.

    The entry points prefill, decode and score are looked at. Raises `PipelineError` where a decoder could be cached in
    part only. `name` is the pass that asks.
    """
    entries = model.entry_points_with("prefill", "decode", "score")
    calls = [
        call
        for call in attention_calls(model, entries)
        # Attention to an encoder's output has its own cache by now.
        if not isinstance(model.module.get_submodule(call.owner), CrossAttention)
    ]
    found, refusals = [], []
    for owner in dict.fromkeys(call.owner for call in calls):
        own = [call for call in calls if call.owner == owner]
        reason = next(filter(None, (_refusal(own, entry.name) for entry in entries)), None)
        if reason is None:
            found.append(own[0])
        else:
            refusals.append(f"{owner or 'the model itself'} {reason}")
            log.refused(owner, reason)
    if refusals and found:
        raise PipelineError(
            f"{name}: a decoder is cached whole or not at all, and {refusals[0]}; "
            "describe the model otherwise or leave the pass out"
        )
    return found


def route_through_caches(model: Model, log: MatchLog, calls: Sequence[AttentionCall], choose: Choose) -> None:
    """Send the attention of each call's module through the cache that `choose` gives it."""
    for call in calls:
        if log.match(call.owner):
            cache = choose(call, model.metadata.max_context)
            # A mask that came with the call has been read: it is causal, within the window that the cache keeps.
            route_attention(model.module.get_submodule(call.owner), CachedAttention(cache, drops_mask=True))


def static_cache(call: AttentionCall, positions: int) -> StaticKVCache:
    """Return the cache with a slot for every position; a window as long as the context is none."""
    window = call.window if call.window is not None and call.window < positions else None
    return StaticKVCache(
        positions, call.key.shape[1], call.key.shape[3], call.value.shape[3], call.key.dtype, window=window
    )


def _refusal(calls: list[AttentionCall], entry_point: str) -> str | None:
    """Say why the calls that one module makes in one entry point cannot be cached, or None."""
    own = [call for call in calls if call.entry_point == entry_point]
    if len(own) != 1:
        return f"makes {len(own)} attention calls in one {entry_point}; exactly one can be cached"
    (call,) = own
    if call.outside:
        return "calls attention outside the forward of any module; move it into one"
    if call.masked:
        reason = call.mask_reason or "is no causal mask"
        return f"passes an explicit mask that {reason}; only causal and sliding attention can be cached"
    if call.dropout:
        return "uses dropout; put the model in evaluation mode"
    if not call.causal and call.query.shape[2] > 1:
        return "is not causal (is_causal=False)"
    if call.query.shape[0] != 1:
        return f"runs on batch size {call.query.shape[0]}; the cache is for batch size 1"
    if call.query.shape[2] != call.key.shape[2]:
        return "attends to keys of another length than its queries (cross-attention)"
    if (call.key.shape[1], call.key.shape[3]) != (calls[0].key.shape[1], calls[0].key.shape[3]):
        return "has other heads in one entry point than in another"
    if call.window != calls[0].window:
        return f"sees the last {call.window} positions in one entry point and {calls[0].window} in another"
    return None
