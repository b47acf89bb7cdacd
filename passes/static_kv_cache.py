"""``static-kv-cache``: causal self-attention over fresh keys becomes attention over a cache of fixed size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.attention import AttentionCall, attention_calls
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.errors import PipelineError
from triptych.modules.attention import CachedAttention
from triptych.modules.kv_cache import StaticKVCache
from triptych.modules.routing import route_attention


@dataclass(frozen=True)
class StaticKVCachePass(SourceTransform):
    """Give every causal self-attention a key-value cache.

    1. The model must describe stateless attention: each entry point with role prefill or decode runs the
       module on fresh positions that begin at `start_pos`.
    2. Every module that makes one causal ``scaled_dot_product_attention`` call, without mask or dropout, in
       such an entry point gets buffers [1, max, heads, head_dim] for keys and values, filled at `start_pos`.
    3. Its queries then attend to every slot up to their own position.

    `max` is the number of slots and becomes the program's context length; without it the context length of
    the model description stands.
    """

    name: ClassVar[str] = "static-kv-cache"
    ensures: ClassVar[frozenset[str]] = frozenset({"kv-cache"})

    max: int | None = None

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Route the attention of `model` through caches; raises `PipelineError` for an impossible `max`."""
        limit = model.metadata.model_max_context
        slots = model.metadata.max_context if self.max is None else self.max
        if not 1 <= slots <= limit:
            raise PipelineError(f"static-kv-cache: max is {slots}, the model allows 1 to {limit} positions")
        model = dataclasses.replace(model, metadata=dataclasses.replace(model.metadata, max_context=slots))
        calls = attention_calls(model, model.entry_points_with("prefill", "decode", "score"))
        prefill = {entry.name for entry in model.entry_points_with("prefill")}
        for owner in dict.fromkeys(call.owner for call in calls):
            own = [call for call in calls if call.owner == owner and call.entry_point in prefill]
            reason = _refusal(own)
            if reason is not None:
                log.refused(owner, reason)
                continue
            (call,) = own
            cache = StaticKVCache(
                slots, call.key.shape[1], call.key.shape[3], call.value.shape[3], dtype=call.key.dtype
            )
            route_attention(model.module.get_submodule(owner), CachedAttention(cache))
            log.matched(owner)
        return model


def _refusal(calls: list[AttentionCall]) -> str | None:
    if len(calls) != 1:
        return f"makes {len(calls)} attention calls in one prefill; one can be cached"
    (call,) = calls
    if call.masked:
        return "passes an explicit mask; only plain causal attention can be cached"
    if call.dropout:
        return "uses dropout; put the model in evaluation mode"
    if not call.causal:
        return "is not causal (is_causal=False)"
    if call.query.shape[0] != 1:
        return f"runs on batch size {call.query.shape[0]}; the cache is for batch size 1"
    if call.query.shape[2] != call.key.shape[2]:
        return "attends to keys of another length than its queries (cross-attention)"
    return None
