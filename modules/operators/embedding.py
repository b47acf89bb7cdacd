"""Reference kernel of lookups in a quantized embedding table."""

from __future__ import annotations

import torch
from torch import Tensor


def quantized_embedding(weight: Tensor, scales: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of a quantized table at `indices` (int64, any shape), dequantized: float32 [..., D].

    `weight` is int8 [V, D]; or uint8 [V, D/2] with two 4-bit values a byte, each 8 too large, the earlier one in the
    upper half (the layout of ExecuTorch's ``quantized_decomposed::embedding_4bit``). `scales` is float32 [V, G], one
    for each of G equal groups of a row's elements. Quantization is symmetric.
    """
    rows, factors = weight[indices], scales[indices]
    if weight.dtype == torch.uint8:
        halves = torch.stack([rows // 16, rows % 16], dim=-1).flatten(-2)
        rows = halves.to(torch.int8) - 8
    grouped = rows.to(scales.dtype).unflatten(-1, (scales.shape[1], -1))
    found: Tensor = (grouped * factors.unsqueeze(-1)).flatten(-2)
    return found
