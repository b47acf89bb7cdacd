"""``expand-tanh-gelu``: the tanh form of GELU becomes the arithmetic it stands for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method


@dataclass(frozen=True)
class ExpandTanhGelu(GraphPass):
    """Spell ``gelu(x, approximate="tanh")`` out (Hendrycks and Gimpel, arXiv:1606.08415, section 2).

    1. It becomes 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
    2. The exact form, ``approximate="none"``, stays.

    ExecuTorch's XNNPACK back end drops the `approximate` argument and computes the exact form, which is off by
    up to 5e-4 where the model was trained with the other.
    """

    name: ClassVar[str] = "expand-tanh-gelu"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Expand every call in its tanh form."""
        for node in editor.calls(torch.ops.aten.gelu.default):
            if node.kwargs.get("approximate", "none") == "tanh" and log.match(node):
                editor.inline(node, _tanh_gelu)


def _tanh_gelu(value: Tensor, *, approximate: str) -> Tensor:
    assert approximate == "tanh"
    inner = math.sqrt(2 / math.pi) * (value + 0.044715 * (value * value * value))
    return 0.5 * value * (1 + torch.tanh(inner))
