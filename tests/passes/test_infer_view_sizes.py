"""`infer-view-sizes` leaves the one dynamic size of a reshape to be inferred."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.rules import S, applied, captured
from triptych.compiler.program import Program
from triptych.passes.infer_view_sizes import InferViewSizes


class Heads(nn.Module):
    """Reshapes as attention makes them, by five operators."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        heads = x.view(1, x.shape[1], 17, 2).transpose(1, 2)
        merged = heads.transpose(1, 2).reshape(1, x.shape[1], -1)
        mixed = x.transpose(1, 2).reshape(-1)  # not how the memory lies: it needs a copy
        return mixed, merged + x.unflatten(-1, (17, 2)).flatten(2)


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten() * 2


class TwoSizes(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.unsqueeze(2) * y.unsqueeze(1)).view(1, x.shape[1], y.shape[1], 2, 2).sum()


def sizes(program: Program) -> list[Any]:
    nodes = program.methods["main"].exported.graph.nodes
    return [node.args[1] for node in nodes if str(node.target) == "aten.view.default"]


@pytest.mark.parametrize("length", [2, 7])
def test_every_reshape_is_a_view_with_an_inferred_size(length: int) -> None:
    rewritten, result = applied(captured(Heads(), (1, S, 34), outputs=2), InferViewSizes(), torch.randn(1, length, 34))
    assert len(result.matches) == 5
    assert sizes(rewritten) == [[1, -1, 17, 2], [1, -1, 34], [-1], [1, -1, 17, 2], [1, -1, 34]]
    copies = [node for node in rewritten.methods["main"].exported.graph.nodes if "clone" in str(node.target)]
    assert len(copies) == 1


def test_a_flattened_tensor_has_one_inferred_size() -> None:
    rewritten, _ = applied(captured(Flat(), (1, S, 12)), InferViewSizes(), torch.randn(1, 7, 12))
    assert sizes(rewritten) == [[-1]]


def test_a_second_run_finds_nothing() -> None:
    rewritten, _ = applied(captured(Heads(), (1, S, 34), outputs=2), InferViewSizes(), torch.randn(1, 2, 34))
    again, result = applied(rewritten, InferViewSizes(), torch.randn(1, 2, 34))
    assert not result.matches
    assert again is rewritten


def test_two_dynamic_sizes_cannot_be_inferred() -> None:
    other = type(S)("T", 2, 16)
    program = captured(TwoSizes(), (1, S, 4), (1, other, 4))
    _, result = applied(program, InferViewSizes(), torch.randn(1, 3, 4), torch.randn(1, 5, 4))
    assert [refusal.reason for refusal in result.refusals] == ["it is to 2 dynamic sizes; one can be inferred"]
