"""``static-kv-cache``: causal self-attention over fresh keys becomes attention over a cache of fixed size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.attention import AttentionCall, attention_calls
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.compiler.properties import KV_CACHE, Property
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
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})
    uniform: ClassVar[bool] = True
    indivisible: ClassVar[bool] = True

    max: int | None = None

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Route the attention of `model` through caches; raises `PipelineError` for an impossible `max`."""
        limit = model.metadata.model_max_context
        slots = model.metadata.max_context if self.max is None else self.max
        if not 1 <= slots <= limit:
            raise PipelineError(f"static-kv-cache: max is {slots}, the model allows 1 to {limit} positions")
        model = dataclasses.replace(model, metadata=dataclasses.replace(model.metadata, max_context=slots))
        entries = model.entry_points_with("prefill", "decode", "score")
        calls = attention_calls(model, entries)
        refusals = []
        for owner in dict.fromkeys(call.owner for call in calls):
            own = [call for call in calls if call.owner == owner]
            reason = next(filter(None, (_refusal(own, entry.name) for entry in entries)), None)
            if reason is not None:
                refusals.append(f"{owner or 'the model itself'} {reason}")
                log.refused(owner, reason)
                continue
            if not log.match(owner):
                continue
            call = own[0]
            cache = StaticKVCache(slots, call.key.shape[1], call.key.shape[3], call.value.shape[3], call.key.dtype)
            route_attention(model.module.get_submodule(owner), CachedAttention(cache))
        if refusals and log.matches:
            raise PipelineError(
                f"static-kv-cache: a decoder is cached whole or not at all, and {refusals[0]}; "
                "describe the model otherwise or leave the pass out"
            )
        return model


def _refusal(calls: list[AttentionCall], entry_point: str) -> str | None:
    """Say why the calls that one module makes in one entry point cannot be cached, or None."""
    own = [call for call in calls if call.entry_point == entry_point]
    if len(own) != 1:
        return f"makes {len(own)} attention calls in one {entry_point}; exactly one can be cached"
    (call,) = own
    if call.outside:
        return "calls attention outside the forward of any module; move it into one"
    if call.masked:
        return "passes an explicit mask; only plain causal attention can be cached"
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
    return None
