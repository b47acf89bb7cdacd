"""A cache of the last positions, and of the first where it is an attention sink."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.modules.kv_cache.base import Kernels, KVCache, row_name


class RingKVCache(KVCache):
    """Keeps the last `window` positions, whatever the length of the conversation, and the first `sink` for ever.

    Buffers are ``keys`` and ``values``, [1, sink + window, heads, head_dim], or ``keys_sink<n>`` and ``values_sink<n>``
    where `sink` is n > 0. A query at position p sees p - window + 1 … p and the first `sink` positions.
    """

    def __init__(
        self, window: int, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, sink: int = 0
    ) -> None:
        super().__init__()
        self.window, self.sink = window, sink
        for part, width in (("keys", head_dim), ("values", value_dim)):
            self.register_buffer(row_name(part, sink), torch.zeros(1, sink + window, heads, width, dtype=dtype))

    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor, scale: float | None
    ) -> Tensor:
        """Attend over what the ring holds and the fresh positions, then write these: they overwrite what was seen."""
        keys, values = self.get_buffer(row_name("keys", self.sink)), self.get_buffer(row_name("values", self.sink))
        attended = kernels.ring_sdpa(query, key, value, keys, values, start_pos, self.sink, scale)
        torch.ops.triptych.update_ring_cache(keys, key, start_pos, self.sink)
        torch.ops.triptych.update_ring_cache(values, value, start_pos, self.sink)
        return attended

    def extra_repr(self) -> str:
        """Show window and sink."""
        return f"window={self.window}, sink={self.sink}"
