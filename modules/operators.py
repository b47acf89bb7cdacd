"""Neutral operators that passes speak and targets legalize.

Layout of queries, keys and values is [B, S, H, D] (batch, sequence, heads, head dimension), the layout of a
KV row. Positions come as a tensor, so no program needs a data-dependent integer before its target asks for
one. Each operator is composite: its reference kernel below is its meaning on every device, under fake tensors
and under autograd, and tracing the kernel is its legalization to aten.

================================  =====================================  ==================================
operator                          ExecuTorch                             aten
================================  =====================================  ==================================
``triptych::update_cache``        ``llama::update_cache``                ``index_copy_``
``triptych::cached_sdpa``         ``llama::custom_sdpa``                 ``scaled_dot_product_attention``
================================  =====================================  ==================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

NAMESPACE: Final = "triptych"


def update_cache(cache: Tensor, value: Tensor, start_pos: Tensor) -> None:
    """Write `value` [B, S, H, D] into `cache` [B, max, H, D] at slots start_pos … start_pos + S - 1, in place.

    `start_pos` is int64 [1]. A write past the last slot is an index error.
    """
    slots = torch.arange(value.shape[1], device=value.device) + start_pos
    cache.index_copy_(1, slots, value)


def cached_sdpa(query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention of fresh queries over a filled cache.

    `query` is [B, S, H, D]; `key` and `value` are whole cache rows [B, max, H_kv, D] where H is a multiple of
    H_kv (grouped queries); `start_pos` is int64 [1]. Query i stands at position start_pos + i and attends to
    slots 0 … start_pos + i. `scale` defaults to 1/sqrt(D). Returns [B, S, H, D].
    """
    positions = torch.arange(query.shape[1], device=query.device) + start_pos
    mask = torch.arange(key.shape[1], device=query.device).unsqueeze(0) <= positions.unsqueeze(1)
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2)


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define("update_cache(Tensor(a!) cache, Tensor value, Tensor start_pos) -> ()")
_library.define("cached_sdpa(Tensor query, Tensor key, Tensor value, Tensor start_pos, float? scale=None) -> Tensor")
_library.impl("update_cache", update_cache, "CompositeImplicitAutograd")
_library.impl("cached_sdpa", cached_sdpa, "CompositeImplicitAutograd")

REFERENCE_KERNELS: Final[dict[Any, Callable[..., Any]]] = {
    torch.ops.triptych.update_cache.default: update_cache,
    torch.ops.triptych.cached_sdpa.default: cached_sdpa,
}
"""The function that defines each operator; legalization to aten traces it."""
