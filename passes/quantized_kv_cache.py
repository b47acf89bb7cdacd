"""``quantized-kv-cache``: caches keep their keys and values in int8."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform, Tolerance
from triptych.compiler.properties import KV_CACHE, Property
from triptych.modules.attention import CachedAttention
from triptych.modules.kv_cache import QuantizedKVCache, QuantizedRingKVCache, RingKVCache, StaticKVCache
from triptych.modules.routing import routed_handler


@dataclass(frozen=True)
class QuantizedKVCachePass(SourceTransform):
    """Keep keys and values as int8 with one float32 scale for each position and head.

    1. Static caches and rings, with or without a sink, become their int8 forms: a row of head_dim elements is divided
       by its scale, its largest magnitude over 127, and rounded. There is no zero point.
    2. Attention sees the rounded form of every position, fresh ones included, so that the way a conversation is split
       into calls makes no difference.
    3. A cache that is int8 already is refused.

    A position takes head_dim + 4 bytes a head for keys and as much for values, a quarter to a third of float32. That
    saves memory and not time: every call reads the cache back to float.
    """

    name: ClassVar[str] = "quantized-kv-cache"
    requires: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})
    uniform: ClassVar[bool] = True
    indivisible: ClassVar[bool] = True
    after: ClassVar[frozenset[str]] = frozenset({"static-kv-cache", "ring-kv-cache", "sink-kv-cache"})
    tolerances: ClassVar[Mapping[str, Tolerance]] = MappingProxyType(
        {dtype: Tolerance(relative=5e-2, kl=2e-2) for dtype in ("float32", "bfloat16", "float16")}
    )

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Quantize every cache."""
        for name, module in model.module.named_modules():
            handler = routed_handler(module)
            if not isinstance(handler, CachedAttention):
                continue
            cache = handler.cache
            if isinstance(cache, (QuantizedKVCache, QuantizedRingKVCache)):
                log.refused(name, "its cache is int8 already")
            elif isinstance(cache, StaticKVCache):
                if log.match(name):
                    handler.cache = QuantizedKVCache.of(cache)
            elif isinstance(cache, RingKVCache):
                if log.match(name):
                    handler.cache = QuantizedRingKVCache.of(cache)
            else:
                log.refused(name, f"has a {type(cache).__name__}, which has no int8 form")
        return model
