"""Key-value caches as modules with registered buffers, so that export sees them as state."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StaticKVCache(nn.Module):
    """A cache of fixed size: slot p holds the key and the value of position p.

    Buffers ``keys`` and ``values`` are [1, max_context, heads, head_dim] and start as zeros.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, max_context: int, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, max_context, heads, head_dim, dtype=dtype))
        self.register_buffer("values", torch.zeros(1, max_context, heads, value_dim, dtype=dtype))

    def update(self, keys: Tensor, values: Tensor, start_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Write [1, S, heads, head_dim] rows at `start_pos` (int64 [1]) and return the whole rows."""
        torch.ops.triptych.update_cache(self.keys, keys, start_pos)
        torch.ops.triptych.update_cache(self.values, values, start_pos)
        return self.keys, self.values
