"""A cache with a slot for every position."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.modules.kv_cache.base import Kernels, KVCache


class StaticKVCache(KVCache):
    """A cache of fixed size: slot p holds the key and the value of position p.

    Buffers ``keys`` and ``values`` are [1, max_context, heads, head_dim] and start as zeros. With `window` a query sees
    the last `window` positions only, its own included; all of them stay.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        max_context: int,
        heads: int,
        head_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.window = window
        self.register_buffer("keys", torch.zeros(1, max_context, heads, head_dim, dtype=dtype))
        self.register_buffer("values", torch.zeros(1, max_context, heads, value_dim, dtype=dtype))

    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor, scale: float | None
    ) -> Tensor:
        """Write at slots from `start_pos` on, then attend over all slots."""
        torch.ops.triptych.update_cache(self.keys, key, start_pos)
        torch.ops.triptych.update_cache(self.values, value, start_pos)
        window = {} if self.window is None else {"window": self.window}
        return kernels.cached_sdpa(query, self.keys, self.values, start_pos, scale, **window)

    def extra_repr(self) -> str:
        """Show the window."""
        return "" if self.window is None else f"window={self.window}"
