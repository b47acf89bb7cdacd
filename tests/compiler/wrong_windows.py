"""Sliding-window caches with one bug each, planted by source passes after ``static-kv-cache`` or ``ring-kv-cache``."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.modules.attention import CachedAttention
from triptych.modules.kv_cache import Kernels, KVCache, RingKVCache, StaticKVCache
from triptych.modules.routing import routed_handler


@dataclass(frozen=True)
class WrongWindow(SourceTransform):
    """Changes every cache that has a window."""

    after: ClassVar[frozenset[str]] = frozenset({"static-kv-cache", "ring-kv-cache"})

    def transform(self, model: Model, log: MatchLog) -> Model:
        for name, module in model.module.named_modules():
            handler = routed_handler(module)
            if isinstance(handler, CachedAttention) and getattr(handler.cache, "window", None) and log.match(name):
                handler.cache = self.changed(handler.cache)
        return model

    @abstractmethod
    def changed(self, cache: KVCache) -> KVCache:
        """Return the wrong cache."""


class WindowOff(WrongWindow):
    """Every earlier position is seen."""

    name: ClassVar[str] = "window-off"

    def changed(self, cache: KVCache) -> KVCache:
        assert isinstance(cache, StaticKVCache)
        cache.window = None
        return cache


class WindowOneLonger(WrongWindow):
    """One position more than the model's window is seen."""

    name: ClassVar[str] = "window-one-longer"

    def changed(self, cache: KVCache) -> KVCache:
        assert isinstance(cache, StaticKVCache)
        assert cache.window is not None
        cache.window += 1
        return cache


class RingOneSlotOff(WrongWindow):
    """Position p is written to the slot that p + 1 is read from."""

    name: ClassVar[str] = "ring-one-slot-off"

    def changed(self, cache: KVCache) -> KVCache:
        assert isinstance(cache, RingKVCache)
        _, slots, heads, width = cache.keys.shape
        return _OneSlotOff(slots, heads, width, cache.values.shape[3], cache.keys.dtype)


class _OneSlotOff(RingKVCache):
    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor, scale: float | None
    ) -> Tensor:
        attended = kernels.ring_sdpa(query, key, value, self.keys, self.values, start_pos, 0, scale)
        torch.ops.triptych.update_ring_cache(self.keys, key, start_pos + 1, 0)
        torch.ops.triptych.update_ring_cache(self.values, value, start_pos + 1, 0)
        return attended
