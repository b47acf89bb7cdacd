"""Reference kernels of attention over key-value caches, and the masks that say which slots a query sees.

Layout of queries, keys and values is [B, S, H, D] (batch, sequence, heads, head dimension), the layout of a KV row.
H is a multiple of the caches' H_kv: query head h attends to key head h // (H / H_kv).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.modules.operators.cache import dequantize_rows, ring_positions


def cached_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start_pos: Tensor,
    scale: float | None = None,
    *,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of fresh queries over a static cache, whose slot p holds position p.

    `query` is [B, S, H, D]; `key` and `value` are whole cache rows [B, max, H_kv, D]; `start_pos` is int64 [1].
    Query i stands at position p = start_pos + i and sees slots 0 … p; with `window` slots p - window + 1 … p. An
    `attn_mask` that broadcasts to [B, H, S, max] stands in place of both: bool (True is seen), or float, added to the
    scores. `scale` defaults to 1/sqrt(D). `softcap` c turns each scaled score x into c tanh(x/c) before the mask
    (Gemma 2, arXiv:2408.00118, section 2). Returns [B, S, H, D_value]. Raises `ValueError` for a mask and a window.
    """
    if attn_mask is not None and window is not None:
        raise ValueError("attn_mask says what every query sees: give it, or a window, not both")
    if attn_mask is None:
        attn_mask = causal_mask(start_pos, query.shape[1], key.shape[1], window)
    return attend(query, key, value, attn_mask, scale, softcap)


def ring_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    start_pos: Tensor,
    sink: int = 0,
    scale: float | None = None,
    *,
    softcap: float | None = None,
) -> Tensor:
    """Sliding attention over a ring as it was before the fresh positions, and over these.

    `query` [B, S, H, D], `key` and `value` [B, S, H_kv, D] are of the fresh positions start_pos … start_pos + S - 1;
    `ring_keys` and `ring_values` [B, sink + window, H_kv, D] hold what ``update_ring_cache`` wrote for the positions
    before; write the fresh ones afterwards. The query at position p sees p - window + 1 … p, and the first `sink`
    positions. As nothing the fresh queries need is overwritten, S may be larger than the window. `start_pos` is int64
    [1]; `scale` and `softcap` as in `cached_sdpa`. Returns [B, S, H, D_value].
    """
    mask = ring_mask(start_pos, query.shape[1], ring_keys.shape[1], sink)
    keys, values = torch.cat([ring_keys, key], dim=1), torch.cat([ring_values, value], dim=1)
    return attend(query, keys, values, mask, scale, softcap)


def quantized_cached_sdpa(
    query: Tensor,
    key: Tensor,
    key_scales: Tensor,
    value: Tensor,
    value_scales: Tensor,
    start_pos: Tensor,
    scale: float | None = None,
    *,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`cached_sdpa` over rows that ``update_quantized_cache`` wrote.

    `key` and `value` are int8 [B, max, H_kv, D]; their scales float32 [B, max, H_kv, 1], one for each position and
    head: an element stands for its integer times its scale.
    """
    keys, values = dequantize_rows(key, key_scales, query.dtype), dequantize_rows(value, value_scales, query.dtype)
    return cached_sdpa(query, keys, values, start_pos, scale, window=window, softcap=softcap)


# ---------------------------------------------------------------------------------------------------- masks


def causal_mask(start_pos: Tensor, length: int, slots: int, window: int | None = None) -> Tensor:
    """Return bool [length, slots]: does the query at start_pos + row see the position of the slot?"""
    positions = (torch.arange(length, device=start_pos.device) + start_pos).unsqueeze(1)
    slot = torch.arange(slots, device=start_pos.device).unsqueeze(0)
    seen = slot <= positions
    return seen if window is None else seen & (slot > positions - window)


def ring_mask(start_pos: Tensor, length: int, slots: int, sink: int = 0) -> Tensor:
    """Return bool [length, slots + length]: what fresh queries see of a ring and of the fresh positions, in a row."""
    fresh = torch.arange(length, device=start_pos.device) + start_pos
    held = torch.cat([ring_positions(start_pos, slots, sink), fresh]).unsqueeze(0)
    positions = fresh.unsqueeze(1)
    near = held > positions - (slots - sink)
    return (held >= 0) & (held <= positions) & (near | (held < sink) if sink else near)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention of `query` [B, S, H, D] over all of `key` and `value` [B, K, H_kv, D] by a mask [S, K] or wider."""
    grouped = bool(query.shape[2] != key.shape[2])
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if softcap is None:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return attended.transpose(1, 2)
    if grouped:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = softcap * torch.tanh((query @ key.transpose(-1, -2)) * (factor / softcap))
    scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)
