"""Reference kernels that write key-value caches, and what their slots hold.

Rows are [B, slots, H, D]. A static cache keeps position p in slot p. A ring keeps the first `sink` positions for ever
and the last of the others in turn: position p ≥ sink lies in slot sink + (p - sink) % window, where the row has
sink + window slots. Int8 rows have float32 scales [B, slots, H, 1] beside them.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

LARGEST: Final = 127
"""The largest magnitude of an int8 row; symmetric, so that zero stays zero."""


def update_cache(cache: Tensor, value: Tensor, start_pos: Tensor) -> None:
    """Write `value` [B, S, H, D] into `cache` [B, max, H, D] at slots start_pos … start_pos + S - 1, in place.

    `start_pos` is int64 [1]. A write past the last slot is an index error.
    """
    slots = torch.arange(value.shape[1], device=value.device) + start_pos
    cache.index_copy_(1, slots, value)


def update_ring_cache(cache: Tensor, value: Tensor, start_pos: Tensor, sink: int = 0) -> None:
    """Write `value` [B, S, H, D] of positions start_pos … start_pos + S - 1 into a ring, in place.

    `cache` is [B, sink + window, H, D] and has been written without gaps up to `start_pos` (int64 [1]). Of the
    positions from `sink` on the last `window` stay, however many are written at once.
    """
    if is_one(value.shape[1]):
        cache.index_copy_(1, ring_slot(start_pos, cache.shape[1], sink), value)
        return
    source, written = ring_source(start_pos, value.shape[1], cache.shape[1], sink)
    cache.copy_(torch.where(written.reshape(1, -1, 1, 1), value.index_select(1, source), cache))


def update_quantized_cache(cache: Tensor, scales: Tensor, value: Tensor, start_pos: Tensor) -> None:
    """Quantize `value` [B, S, H, D] row by row and write it as `update_cache` does, in place.

    `cache` is int8 [B, max, H, D], `scales` float32 [B, max, H, 1]; see `quantize_rows`.
    """
    quantized, scale = quantize_rows(value)
    update_cache(cache, quantized, start_pos)
    update_cache(scales, scale, start_pos)


# ---------------------------------------------------------------------------------------------------- int8 rows


def quantize_rows(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [..., D] and float32 scales [..., 1]: symmetric, the largest element of each row becomes ±127."""
    scale = (value.abs().amax(dim=-1, keepdim=True).to(torch.float32) / LARGEST).clamp_min(1e-30)
    return torch.round(value / scale).clamp(-LARGEST, LARGEST).to(torch.int8), scale


def dequantize_rows(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what int8 rows [..., D] with scales [..., 1] stand for."""
    return (quantized.to(torch.float32) * scales).to(dtype)


# ---------------------------------------------------------------------------------------------------- rings


def ring_positions(end: Tensor, slots: int, sink: int = 0) -> Tensor:
    """Return int64 [slots]: the position each slot holds once positions 0 … end - 1 are written, -1 for none."""
    slot = torch.arange(slots, device=end.device)
    window, newest = slots - sink, end - 1 - sink
    # Full turns are added so that no dividend is negative: ExecuTorch's kernel gives such remainders their sign.
    ahead = newest - (slot - sink) + (slots // window + 1) * window
    turn = newest - torch.remainder(ahead, window)
    held = torch.where(turn >= 0, turn + sink, -1)
    return torch.where(slot < sink, torch.where(slot < end, slot, -1), held) if sink else held


def is_one(length: int | torch.SymInt) -> bool:
    """Return whether a length is 1 in every call; a dynamic one is not."""
    return isinstance(length, int) and length == 1


def ring_slot(position: Tensor, slots: int, sink: int = 0) -> Tensor:
    """Return the slot of one position (int64 [1])."""
    turn = torch.remainder((position - sink).clamp_min(0), slots - sink) + sink
    return torch.where(position < sink, position, turn) if sink else turn


def ring_source(start_pos: Tensor, length: int, slots: int, sink: int = 0) -> tuple[Tensor, Tensor]:
    """Say what a write of `length` positions puts in each slot: the index among them (int64), and whether any (bool).

    The index of a slot that keeps what it holds is 0.
    """
    held = ring_positions(start_pos + length, slots, sink)
    return (held - start_pos).clamp_min(0), held >= start_pos
