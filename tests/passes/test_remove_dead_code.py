"""`remove-dead-code` removes what serves nobody, and leaves what another method or the next call may see."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from tests.compiler import tiny
from tests.passes.graphs import assert_same, exported, operators, rewritten
from triptych.compiler.program import Program
from triptych.errors import VerificationError
from triptych.passes import remove_dead_code
from triptych.passes.remove_dead_code import RemoveDeadCode
from triptych.testing import check_pass, default_model

PASS = RemoveDeadCode()
aten = torch.ops.aten


class Wasteful(tiny.TinyAttention):
    """Computes what it does not return: with dropout, and in memory of its own."""

    def __init__(self, width: int = tiny.WIDTH) -> None:
        super().__init__(width)
        self.unused = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        wasted = F.dropout(self.unused(x), 0.5, training=True)
        memory = torch.zeros_like(wasted)
        memory.add_(wasted)
        memory[:, :1].mul_(2)
        attended: Tensor = super().forward(x)
        return attended


class Memory(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        memory = x * 2
        before = memory.sum()
        memory.add_(1)
        seen = memory * 3
        memory.mul_(5)
        return seen + before


class Written(nn.Module):
    """Writes through a view what it returns as a whole."""

    def forward(self, x: Tensor) -> Tensor:
        memory = x * 2
        memory[:1].add_(1)
        memory.view(-1)[2:].neg_()
        return memory


def run(module: nn.Module) -> Any:
    x = torch.randn(3, 4)
    program, _ = rewritten(exported(module, x), PASS)
    assert_same(module, program, x)
    return program


def test_dead_branches_go_with_their_weights() -> None:
    check = check_pass(
        PASS, tiny.tiny(Wasteful(), tiny.TinyAttention()), matches={"prefill": 6, "decode": 6}, effect=fewer_bytes
    )
    assert isinstance(check.after, Program)
    for method in ("prefill", "decode"):
        left = operators(check.after.methods[method].exported)
        assert left["aten.dropout.default"] == left["aten.add_.Tensor"] == left["aten.zeros_like.default"] == 0


def fewer_bytes(before: Any, after: Any) -> bool:
    freed = set(before.weights) - set(after.weights)
    return freed == {"blocks.0.attention.unused.weight", "blocks.0.attention.unused.bias"}


def test_a_model_without_dead_code_stays() -> None:
    check_pass(PASS, default_model(), matches=0)


def test_writes_that_are_read_stay_and_the_last_one_goes() -> None:
    program = run(Memory())
    found = operators(program)
    assert found["aten.add_.Tensor"] == 1
    assert found["aten.mul_.Tensor"] == 0


def test_writes_through_views_of_a_result_stay() -> None:
    found = operators(run(Written()))
    assert found["aten.add_.Tensor"] == found["aten.neg_.default"] == 1


def test_writes_into_an_input_stay() -> None:
    class Filling(nn.Module):
        def forward(self, x: Tensor, out: Tensor) -> Tensor:
            out.add_(x)
            return x * 2

    program, log = rewritten(exported(Filling(), torch.randn(3), torch.randn(3)), PASS)
    assert log.matches == []
    assert operators(program)["aten.add_.Tensor"] == 1


def test_state_that_another_method_reads_is_still_written() -> None:
    """The encoder of this model writes and reads nothing of what it writes; decode does."""

    class Noted(tiny.TinyAttention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("note", torch.zeros(1))
            self.note: Tensor

        def forward(self, x: Tensor) -> Tensor:
            F.dropout(x, 0.5, training=True)
            attended: Tensor = super().forward(x)
            if x.shape[1] == 1:  # decode alone reads it
                return attended + 0 * self.note
            self.note.copy_(x.mean().reshape(1))
            return attended

    captured = tiny.captured(tiny.tiny(Noted()))
    program = captured.rewrite(PASS).program
    (row,) = (row for row in program.state.values() if row.name.endswith("note"))
    assert (row.readers, row.writers) == (("decode",), ("prefill",))
    assert operators(program.methods["prefill"].exported)["aten.dropout.default"] == 0


def test_taking_a_write_for_dead_that_is_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def blind(node: Node, *_: Any) -> bool:
        return node.op == "output"

    monkeypatch.setattr(remove_dead_code, "_has_effect", blind)
    with pytest.raises(AssertionError, match="not close"):
        run(Written())
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(PASS, tiny.tiny(), matches={"prefill": 4, "decode": 4})
