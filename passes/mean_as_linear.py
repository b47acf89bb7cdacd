"""``mean-as-linear``: a mean over the last axis becomes a product with a row of equal weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method

aten = torch.ops.aten


@dataclass(frozen=True)
class MeanAsLinear(GraphPass):
    """Write ``mean(x, -1, keepdim=True)`` as ``linear(x, [1/D, …, 1/D])``, in float32.

    1. XNNPACK's partitioner takes linears and leaves means, so a norm no longer cuts a decoder layer into pieces.
    2. A mean that drops its axis, is over other axes too, or is in another dtype stays.
    """

    name: ClassVar[str] = "mean-as-linear"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Replace every mean over the last axis alone."""
        for node in editor.calls(aten.mean.dim):
            x, axes, keeps_axis = node.args[0], node.args[1], len(node.args) > 2 and node.args[2]
            value = x.meta["val"]  # type: ignore[union-attr]
            if axes not in ([-1], [value.dim() - 1]):
                log.refused(node, f"it is over the axes {axes}; the last axis alone is replaced")
            elif not keeps_axis or node.kwargs.get("dtype") is not None or value.dtype != torch.float32:
                log.refused(node, "it drops its axis or is not in float32")
            elif not isinstance(value.shape[-1], int):
                log.refused(node, "its axis has no fixed size")
            elif log.match(node):
                size = value.shape[-1]
                weight = editor.derive_weight(f"mean_of_{size}", [], partial(_equal_weights, size), key=size)
                with editor.graph.inserting_before(node):
                    mean = editor.call(aten.linear.default, x, weight, like=node)
                node.replace_all_uses_with(mean)
                editor.graph.erase_node(node)


def _equal_weights(size: int) -> Tensor:
    return torch.full((1, size), 1 / size)
