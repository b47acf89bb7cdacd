"""Root mean square normalization (Zhang and Sennrich, arXiv:1910.07467) in operators that XNNPACK takes whole.

ExecuTorch's XNNPACK partitioner takes ``mean`` over the last two axes of four-dimensional tensors only, and no addition
of a number. Spelled with them, every norm cuts the graph in two. Here the mean of squares and the addition of epsilon
are one linear layer with a single output: its weights are 1/D, its bias is epsilon.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def averaging(width: int, eps: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the weight [1, width] and the bias [1] of the linear layer that gives mean(x) + eps."""
    return torch.full((1, width), 1.0 / width, dtype=dtype), torch.full((1,), eps, dtype=dtype)


def rms_norm(x: Tensor, weight: Tensor | None, average: Tensor, eps: Tensor, *, unit_offset: bool = False) -> Tensor:
    """Normalize `x` [..., D] over its last axis and multiply by `weight` [D]: x / √(mean(x²) + eps) · weight.

    `average` and `eps` come from `averaging` and must be parameters of the graph for a back end to fold them. With
    `unit_offset` the gain is 1 + weight, as Gemma has it; without a weight it is 1.
    """
    normed = x * torch.rsqrt(F.linear(x * x, average, eps))
    if weight is None:
        return normed
    scaled = normed * weight
    return normed + scaled if unit_offset else scaled


class RMSNorm(nn.Module):
    """`rms_norm` with its parameters; takes the place of ``torch.nn.RMSNorm`` over the last axis.

    Args:
        width: the size of the last axis.
        eps: added to the mean of squares.
        has_weight: False for a norm without a gain.
        unit_offset: whether the gain is 1 + weight.
    """

    average: Tensor
    eps: Tensor

    def __init__(self, width: int, eps: float, *, has_weight: bool = True, unit_offset: bool = False) -> None:
        super().__init__()
        initial = torch.zeros(width) if unit_offset else torch.ones(width)
        self.weight = nn.Parameter(initial) if has_weight else None
        average, bias = averaging(width, eps)
        self.register_buffer("average", average, persistent=False)
        self.register_buffer("eps", bias, persistent=False)
        self.unit_offset = unit_offset

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` [..., width]."""
        return rms_norm(x, self.weight, self.average, self.eps, unit_offset=self.unit_offset)
