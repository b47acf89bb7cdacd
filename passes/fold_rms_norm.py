"""``fold-rms-norm``: root mean square normalization spelled out becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.compiler.rewrite_rule import RewriteRule, RuleMatch

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldRMSNorm(RewriteRule):
    """Fold ``weight * (x * rsqrt(mean(x², -1) + eps))`` into ``rms_norm`` (Zhang and Sennrich, arXiv:1910.07467).

    The mean is over the last axis, and x and weight have one dtype (``remove-no-op-casts`` takes idle casts away).
    """

    name: ClassVar[str] = "fold-rms-norm"
    uniform: ClassVar[bool] = True
    after: ClassVar[frozenset[str]] = frozenset({"remove-no-op-casts"})

    def pattern(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mean = aten.mean.dim(aten.pow.Tensor_Scalar(x, 2), [-1], True)
        return aten.mul.Tensor(weight, aten.mul.Tensor(x, aten.rsqrt.default(aten.add.Tensor(mean, eps))))

    def check(self, match: RuleMatch) -> str | None:
        x, weight = match.value("x"), match.value("weight")
        if x.dtype != weight.dtype:
            return f"x is {x.dtype} and weight {weight.dtype}"
        return None if weight.shape == x.shape[-1:] else f"weight has shape {list(weight.shape)}, not [{x.shape[-1]}]"

    def replacement(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, [weight.shape[0]], weight, eps)
