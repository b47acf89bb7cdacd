"""``fuse-gate-up``: the two projections of a gated feed-forward layer become one matrix product."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.linears import LINEAR, Group, fuse, linears_behind
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method

aten = torch.ops.aten
ELEMENTWISE: Final = frozenset(
    {aten.to.dtype, aten.alias.default, aten.dropout.default, aten.contiguous.default, aten.softplus.default}
)
"""Operators that treat elements alike and do not carry the tag that says so."""


@dataclass(frozen=True)
class FuseGateUp(GraphPass):
    """Stack the gate and up projections of a gated linear unit along their output axis (Shazeer, arXiv:2002.05202).

    1. Two linears over the same input (the same node, or equal quantizations of it) whose results are multiplied with
       each other, at least one of them through an activation: any elementwise operators, so SwiGLU and GeGLU in every
       spelling. They become one linear with the rows of both, the activated one first, and slices of its result take
       their places.
    2. Weights are float parameters or torchao's dequantized ones, scales and zero points included; both of one format.
       A linear without a bias beside one that has it gets zeros.
    3. Sums of linears (low-rank adapters) and weights that anything else in the method uses (they would be stored
       twice) are left alone.

    Every output is the same sum of the same products as before. Methods that share the weights share the stack. A
    method in which the projections cannot be stacked keeps its own, and the program then stores both forms.
    """

    name: ClassVar[str] = "fuse-gate-up"

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Look at every product, then stack what can be."""
        groups = []
        for node in editor.calls(aten.mul.Tensor):
            one, other = node.args
            if not isinstance(one, Node) or not isinstance(other, Node):
                continue
            first, second = linears_behind(one, _is_elementwise), linears_behind(other, _is_elementwise)
            together = sorted({*first, *second})
            has_activation = one.target is not LINEAR or other.target is not LINEAR
            if not first or not second or len(together) == 1 or not has_activation:
                continue
            if len(together) > 2:
                log.refused(node, f"its factors combine the results of {len(together)} linears")
            else:
                activated, plain = (second, first) if one.target is LINEAR else (first, second)
                groups.append(Group(node, (activated[0], plain[0])))
        fuse(editor, groups, "gate_up", log)


def _is_elementwise(node: Node) -> bool:
    if node.target is operator.getitem or not isinstance(node.target, OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in ELEMENTWISE
