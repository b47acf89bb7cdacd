"""`expand-splits` takes splits apart where their axis has a fixed size."""

import torch
from torch import Tensor, nn

from tests.compiler.rules import S, applied, captured, targets
from triptych.manifest import DynamicDim
from triptych.passes.expand_splits import ExpandSplits


class Splits(nn.Module):
    """Three forms along the last axis, one of which leaves a part unused, and one along the first."""

    def forward(self, x: Tensor) -> Tensor:
        a, _, c = x.split([2, 3, 5], dim=-1)
        d, e, f = x.split(4, dim=2)
        g, h = x.chunk(2, -1)
        (first,) = x.chunk(1)
        return a.sum(-1) + c.sum(-1) * d.sum(-1) + e.mean(-1) - f.amax(-1) + g.sum(-1) * h.amin(-1) + first[..., 0]


class AlongTheLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, other = x.split([2, x.shape[1] - 2], dim=1)
        return one.sum() + other.sum() + x


def test_parts_become_slices() -> None:
    rewritten, result = applied(captured(Splits(), (1, S, 10)), ExpandSplits(), torch.randn(1, 5, 10))
    assert len(result.matches) == 4
    found = targets(rewritten)
    assert found.count("aten.slice.Tensor") == 8  # of nine parts one is not used
    assert not any("split" in name or "chunk" in name or "getitem" in name for name in found)


def test_a_split_of_dynamic_size_stays() -> None:
    program = captured(AlongTheLength(), (1, DynamicDim("S", 4, 16), 10))
    rewritten, result = applied(program, ExpandSplits(), torch.randn(1, 5, 10))
    assert [refusal.reason for refusal in result.refusals] == ["axis 1 has a dynamic size"]
    assert rewritten is program
