"""Int8 forms of the caches: one float32 scale for each position and head, symmetric.

Every key and value is rounded once, when it is written, and attention sees the rounded form of fresh positions too: so
it makes no difference how a conversation is split into calls. A position takes head_dim + 4 bytes a head in place of
4 x head_dim.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from triptych.modules.kv_cache.base import SCALES, Kernels, KVCache, row_name
from triptych.modules.kv_cache.ring import RingKVCache
from triptych.modules.kv_cache.static import StaticKVCache
from triptych.modules.operators.cache import dequantize_rows, quantize_rows


class QuantizedKVCache(KVCache):
    """`StaticKVCache` in int8, with ``keys_scales`` and ``values_scales`` float32 [1, max_context, heads, 1] beside."""

    keys: Tensor
    values: Tensor
    keys_scales: Tensor
    values_scales: Tensor

    def __init__(self, max_context: int, heads: int, head_dim: int, value_dim: int, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        for part, width in (("keys", head_dim), ("values", value_dim)):
            _register(self, part, (1, max_context, heads, width))

    @classmethod
    def of(cls, cache: StaticKVCache) -> Self:
        """Return the int8 form of a cache, empty."""
        _, slots, heads, width = cache.keys.shape
        return cls(slots, heads, width, cache.values.shape[3], cache.window)

    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor, scale: float | None
    ) -> Tensor:
        """Quantize and write, then attend over all slots."""
        torch.ops.triptych.update_quantized_cache(self.keys, self.keys_scales, key, start_pos)
        torch.ops.triptych.update_quantized_cache(self.values, self.values_scales, value, start_pos)
        window = {} if self.window is None else {"window": self.window}
        return kernels.quantized_cached_sdpa(
            query, self.keys, self.keys_scales, self.values, self.values_scales, start_pos, scale, **window
        )

    def extra_repr(self) -> str:
        """Show the window."""
        return "" if self.window is None else f"window={self.window}"


class QuantizedRingKVCache(KVCache):
    """`RingKVCache` in int8; the scales lie in rings of their own."""

    def __init__(self, window: int, heads: int, head_dim: int, value_dim: int, sink: int = 0) -> None:
        super().__init__()
        self.window, self.sink = window, sink
        for part, width in (("keys", head_dim), ("values", value_dim)):
            _register(self, row_name(part, sink), (1, sink + window, heads, width))

    @classmethod
    def of(cls, cache: RingKVCache) -> Self:
        """Return the int8 form of a ring, empty."""
        keys = cache.get_buffer(row_name("keys", cache.sink))
        values = cache.get_buffer(row_name("values", cache.sink))
        return cls(cache.window, keys.shape[2], keys.shape[3], values.shape[3], cache.sink)

    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor, scale: float | None
    ) -> Tensor:
        """Attend over the rounded forms of the ring and of the fresh positions, then write these."""
        fresh, held, writes = [], [], []
        for part, one in (("keys", key), ("values", value)):
            name = row_name(part, self.sink)
            row, scales = self.get_buffer(name), self.get_buffer(name + SCALES)
            quantized, own = quantize_rows(one)
            fresh.append(dequantize_rows(quantized, own, one.dtype))
            held.append(dequantize_rows(row, scales, one.dtype))
            writes += [(row, quantized), (scales, own)]
        attended = kernels.ring_sdpa(query, *fresh, *held, start_pos, self.sink, scale)
        for row, rounded in writes:
            torch.ops.triptych.update_ring_cache(row, rounded, start_pos, self.sink)
        return attended

    def extra_repr(self) -> str:
        """Show window and sink."""
        return f"window={self.window}, sink={self.sink}"


def _register(cache: KVCache, name: str, shape: tuple[int, ...]) -> None:
    cache.register_buffer(name, torch.zeros(shape, dtype=torch.int8))
    cache.register_buffer(name + SCALES, torch.zeros(*shape[:3], 1, dtype=torch.float32))
