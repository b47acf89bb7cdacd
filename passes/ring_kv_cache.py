"""``ring-kv-cache``: sliding attention gets a cache of its window, all other causal self-attention a static one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.attention import AttentionCall
from triptych.compiler.caching import cacheable_calls, route_through_caches, static_cache, with_context
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.compiler.properties import KV_CACHE, Property
from triptych.modules.kv_cache import KVCache, RingKVCache


@dataclass(frozen=True)
class RingKVCachePass(SourceTransform):
    """Keep of a sliding layer what its window can see, and no more.

    1. As in ``static-kv-cache``, modules with one causal ``scaled_dot_product_attention`` call are looked for.
    2. Where the call's mask limits it to a sliding window shorter than the context, the module gets buffers
       [1, window, heads, head_dim]: position p lies in slot p modulo the window. A prefill attends over what the ring
       held before and over its own keys, and is written afterwards, so it may be longer than the window.
    3. Every other module gets a static cache of `max` slots.
    4. A model without such a window is refused: ``static-kv-cache`` does the same for it.

    The function of the model does not change. `max` is the context length; without it that of the model description
    stands. A session over rings cannot be truncated: what left the window is gone.
    """

    name: ClassVar[str] = "ring-kv-cache"
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})
    uniform: ClassVar[bool] = True
    indivisible: ClassVar[bool] = True

    max: int | None = None

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Route the attention of `model` through rings and caches; raises `PipelineError` for an impossible `max`."""
        model = with_context(model, self.name, self.max)
        calls = cacheable_calls(model, log, self.name)
        positions = model.metadata.max_context
        if calls and not any(has_ring(call, positions) for call in calls):
            log.refused(
                calls[0].owner,
                f"no layer has a sliding window shorter than the context of {positions}; use static-kv-cache",
            )
            return model
        route_through_caches(model, log, calls, ring_or_static_cache)
        return model


def has_ring(call: AttentionCall, positions: int) -> bool:
    """Return whether a sliding window shorter than a context of `positions` limits the call."""
    return call.window is not None and call.window < positions


def ring_or_static_cache(call: AttentionCall, positions: int) -> KVCache:
    """Return a ring of the call's window, or the static cache where it has none."""
    if call.window is None or not has_ring(call, positions):
        return static_cache(call, positions)
    return RingKVCache(call.window, call.key.shape[1], call.key.shape[3], call.value.shape[3], call.key.dtype)
