"""Attention modules that take the place of one ``scaled_dot_product_attention`` call.

A routed call (see `routing`) hands its arguments to `CachedAttention`, which keeps the keys and values of
past calls and leaves the arithmetic to a kernel module, so that one pass adds the cache and another chooses
the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from triptych.modules.kv_cache import StaticKVCache
from triptych.modules.operators import cached_sdpa
from triptych.modules.position import current_start_pos


class AtenCachedSDPA(nn.Module):
    """Cached attention spelled in aten: a mask over all slots of the cache."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, start_pos: Tensor, scale: float | None) -> Tensor:
        """Shapes as in `triptych.modules.operators.cached_sdpa`."""
        return cached_sdpa(query, keys, values, start_pos, scale)


class OperatorCachedSDPA(nn.Module):
    """Cached attention as one neutral operator, which each target legalizes to its best kernel."""

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, start_pos: Tensor, scale: float | None) -> Tensor:
        """Shapes as in `triptych.modules.operators.cached_sdpa`."""
        attended: Tensor = torch.ops.triptych.cached_sdpa(query, keys, values, start_pos, scale)
        return attended


class CachedAttention(nn.Module):
    """Causal self-attention over everything seen so far, called like ``scaled_dot_product_attention``."""

    def __init__(self, cache: StaticKVCache) -> None:
        super().__init__()
        self.cache = cache
        self.kernel: nn.Module = AtenCachedSDPA()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`query` [1, H, S, D], `key` and `value` [1, H_kv, S, D] of the fresh positions; returns [1, H, S, D].

        `is_causal` and `enable_gqa` are what the replaced call said; the cached form is always causal and
        groups queries where H differs from H_kv. Raises `ValueError` for a mask or for dropout.
        """
        if attn_mask is not None or dropout_p != 0.0:
            raise ValueError("cached attention replaces causal calls only: no attn_mask, no dropout")
        start_pos = current_start_pos()
        keys, values = self.cache.update(key.transpose(1, 2), value.transpose(1, 2), start_pos)
        attended: Tensor = self.kernel(query.transpose(1, 2), keys, values, start_pos, scale)
        return attended.transpose(1, 2)
