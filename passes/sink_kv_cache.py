"""``sink-kv-cache``: a cache of the first positions and the last, for conversations longer than memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.attention import AttentionCall
from triptych.compiler.caching import cacheable_calls, route_through_caches, with_context
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.compiler.properties import KV_CACHE, Property
from triptych.errors import PipelineError
from triptych.modules.kv_cache import KVCache, RingKVCache
from triptych.passes.ring_kv_cache import has_ring, ring_or_static_cache


@dataclass(frozen=True)
class SinkKVCachePass(SourceTransform):
    """Let full attention see the first `sink` positions and the last `window`, and keep no others.

    1. As in ``static-kv-cache``, modules with one causal ``scaled_dot_product_attention`` call are looked for.
    2. Each gets buffers [1, sink + window, heads, head_dim]: the first positions stay, the others lie in a ring.
    3. A module with a sliding window of its own keeps that, in a ring, as ``ring-kv-cache`` has it.

    This changes the function of the model: from position `window` + `sink` on a query no longer sees what lies
    between (attention sinks, StreamingLLM, arXiv:2309.17453). Before that nothing changes, and the output is the
    model's own. Keys stay rotated for the position they were written at, and positions count on up to `max`; the paper
    numbers them anew within the cache. `max` is the context length, without it that of the model description.
    """

    name: ClassVar[str] = "sink-kv-cache"
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})
    uniform: ClassVar[bool] = True
    indivisible: ClassVar[bool] = True

    window: int
    sink: int = 4
    max: int | None = None

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Route the attention of `model` through sink caches; raises `PipelineError` for impossible sizes."""
        model = with_context(model, self.name, self.max)
        positions = model.metadata.max_context
        if self.window < 1 or not 1 <= self.sink <= self.window:
            raise PipelineError(
                f"sink-kv-cache: window is {self.window} and sink {self.sink}; expected 1 <= sink <= window"
            )
        if self.window + self.sink >= positions:
            raise PipelineError(
                f"sink-kv-cache: window and sink are {self.window} + {self.sink} positions, the context {positions}: "
                "nothing would be dropped; use static-kv-cache, or a smaller window"
            )
        calls = cacheable_calls(model, log, self.name)
        if calls and all(has_ring(call, positions) for call in calls):
            log.refused(calls[0].owner, "every layer has a sliding window of its own; use ring-kv-cache")
            return model
        route_through_caches(model, log, calls, self._cache)
        return model

    def _cache(self, call: AttentionCall, positions: int) -> KVCache:
        if has_ring(call, positions):
            return ring_or_static_cache(call, positions)
        _, heads, _, width = call.key.shape
        return RingKVCache(self.window, heads, width, call.value.shape[3], call.key.dtype, sink=self.sink)
