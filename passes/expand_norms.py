"""``expand-norms``: layer norm and RMS norm become the arithmetic they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandNorms(GraphPass):
    """Spell norms over the last axis out, for back ends that have no operator for them.

    1. ``rms_norm`` becomes ``weight * (x * rsqrt(mean(x²) + eps))`` (Zhang and Sennrich, arXiv:1910.07467).
    2. ``layer_norm`` becomes the same over x less its mean, and its bias is added (Ba et al., arXiv:1607.06450).
    3. A norm over several axes stays.
    """

    name: ClassVar[str] = "expand-norms"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Expand every norm over one axis."""
        for node in editor.calls(aten.rms_norm.default, aten.layer_norm.default):
            axes = node.args[1]
            assert isinstance(axes, (list, tuple))
            if len(axes) != 1:
                log.refused(node, f"it is over the last {len(axes)} axes; one is expanded")
            elif log.match(node):
                editor.inline(node, _rms_norm if node.target is aten.rms_norm.default else _layer_norm)


def _rms_norm(x: Tensor, _shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    smallest = torch.finfo(x.dtype).eps if eps is None else eps
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + smallest)
    return normed if weight is None else normed * weight


def _layer_norm(
    x: Tensor,
    _shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    _cudnn_enable: bool = True,
) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    normed = centered * torch.rsqrt((centered * centered).mean(-1, keepdim=True) + eps)
    scaled = normed if weight is None else normed * weight
    return scaled if bias is None else scaled + bias
