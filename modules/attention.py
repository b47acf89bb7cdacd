"""Attention modules that take the place of one ``scaled_dot_product_attention`` call.

A routed call (see `routing`) hands its arguments to `CachedAttention`. Its cache keeps the keys and values of past
calls and leaves the arithmetic to kernels, so that one pass adds the cache and another chooses the kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from triptych.modules.kv_cache import KVCache
from triptych.modules.operators import attention as reference
from triptych.modules.position import current_start_pos


class AtenKernels(nn.Module):
    """Cached attention spelled in aten: a mask over all slots of the cache."""

    cached_sdpa = staticmethod(reference.cached_sdpa)
    ring_sdpa = staticmethod(reference.ring_sdpa)
    quantized_cached_sdpa = staticmethod(reference.quantized_cached_sdpa)


class OperatorKernels(nn.Module):
    """Cached attention as one neutral operator, which each target legalizes to its best kernel."""

    def cached_sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call ``triptych::cached_sdpa``."""
        attended: Tensor = torch.ops.triptych.cached_sdpa(*args, **kwargs)
        return attended

    def ring_sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call ``triptych::ring_sdpa``."""
        attended: Tensor = torch.ops.triptych.ring_sdpa(*args, **kwargs)
        return attended

    def quantized_cached_sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        """Call ``triptych::quantized_cached_sdpa``."""
        attended: Tensor = torch.ops.triptych.quantized_cached_sdpa(*args, **kwargs)
        return attended


class CachedAttention(nn.Module):
    """Causal self-attention over everything its cache keeps, called like ``scaled_dot_product_attention``.

    With `drops_mask` a mask is accepted and not looked at: whoever sets it has seen that the mask says what the cache
    does by itself.
    """

    def __init__(self, cache: KVCache, *, drops_mask: bool = False) -> None:
        super().__init__()
        self.cache = cache
        self.kernel: AtenKernels | OperatorKernels = AtenKernels()
        self.drops_mask = drops_mask

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
        if (attn_mask is not None and not self.drops_mask) or dropout_p != 0.0:
            raise ValueError("cached attention replaces causal calls only: no attn_mask, no dropout")
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return self.cache.attend(self.kernel, query, key, value, current_start_pos(), scale).transpose(1, 2)
