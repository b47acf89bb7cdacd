"""Position 0 as a part of a graph: what a method that only ever begins a conversation has in place of `start_pos`."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import Node

from triptych.compiler.editing import tidied
from triptych.compiler.program import Method
from triptych.compiler.provenance import MADE_BY
from triptych.compiler.roles import OTHER
from triptych.manifest import TensorSignature

START_POS: Final = "start_pos"


class _Zero(nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros([1], dtype=torch.int64)


def first_position(made_by: str) -> Method:
    """Return a method without inputs whose output `start_pos`, int64 [1], is 0; its nodes carry the pass `made_by`."""
    exported = tidied(torch.export.export(_Zero(), (), strict=False))
    for node in exported.graph.nodes:
        node.meta[MADE_BY] = made_by
    return Method(exported, frozenset({OTHER}), (), (TensorSignature(START_POS, "int64", (1,)),))


def is_first_position(start_pos: Any) -> bool:
    """True for a node that is 0 in every call."""
    return isinstance(start_pos, Node) and start_pos.target is torch.ops.aten.zeros.default
