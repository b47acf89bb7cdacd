"""``static-kv-cache``: causal self-attention over fresh keys becomes attention over a cache of fixed size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.caching import cacheable_calls, route_through_caches, static_cache, with_context
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.compiler.properties import KV_CACHE, Property


@dataclass(frozen=True)
class StaticKVCachePass(SourceTransform):
    """Give every causal self-attention a key-value cache.

    1. The model must describe stateless attention: each entry point with role prefill or decode runs the
       module on fresh positions that begin at `start_pos`.
    2. Every module that makes one causal ``scaled_dot_product_attention`` call, without dropout, in such an entry
       point gets buffers [1, max, heads, head_dim] for keys and values, filled at `start_pos`.
    3. Its queries then attend to every slot up to their own position; where its mask was a causal one within a
       sliding window, to the last slots of that window. Every slot stays.
    4. Other masks, cross-attention and batches are refused.

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
        model = with_context(model, self.name, self.max)
        route_through_caches(model, log, cacheable_calls(model, log, self.name), static_cache)
        return model
