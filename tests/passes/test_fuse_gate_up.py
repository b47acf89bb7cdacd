"""`fuse-gate-up` makes one linear of the two whose results are multiplied, once for all methods."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler import linears
from triptych.compiler.cost import program_cost
from triptych.compiler.model import Model
from triptych.compiler.program import Program
from triptych.compiler.stages import Source
from triptych.compiler.targets.pte import PteFile, read_pte
from triptych.errors import PipelineError, VerificationError
from triptych.passes.fuse_gate_up import FuseGateUp
from triptych.testing import check_pass, default_model

QUANTIZED = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture"
BOTH = {"prefill": 2, "decode": 2}
WIDTH, HIDDEN = 64, 160


class Gated(nn.Module):
    """A block with a gated feed-forward layer."""

    def __init__(self, bias: tuple[bool, bool] = (False, False)) -> None:
        super().__init__()
        self.attention = tiny.TinyAttention(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=bias[0])
        self.up = nn.Linear(WIDTH, HIDDEN, bias=bias[1])
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def product(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(self.product(self.norm(x)))


class Spelled(Gated):
    """Swish from a sigmoid, the plain factor first."""

    def product(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.up(x) * (gate * torch.sigmoid(1.702 * gate))


class Clamped(Gated):
    """Both factors go through something: a clamp, an offset, a cast there and back."""

    def product(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate(x).clamp(max=7.0), approximate="tanh").double().float()
        return (self.up(x).clamp(-7.0, 7.0) + 1) * gate


class Bilinear(Gated):
    """Has no activation."""

    def product(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.up(x)


class Ungated(Gated):
    def product(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) + self.up(x)


class Packed(Gated):
    """One linear for both already."""

    def product(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x).chunk(2, dim=-1)
        return torch.cat((F.silu(gate) * up, gate), dim=-1)


class LowRank(Gated):
    """Adds a low-rank adapter to the plain factor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, HIDDEN, bias=False)

    def product(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * (self.up(x) + self.b(self.a(x)))


class OtherInput(Gated):
    def product(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x.tanh())


class OneUsed(Gated):
    """Uses the gate's weight once more."""

    def product(self, x: Tensor) -> Tensor:
        return F.silu(self.gate(x)) * self.up(x) + F.linear(x.sin(), self.gate.weight)


class Squared(Gated):
    """Two products share a factor."""

    def product(self, x: Tensor) -> Tensor:
        gate, up = self.gate(x), self.up(x)
        return F.silu(gate) * up + torch.tanh(up) * torch.sin(gate)


def model(block: Callable[[], nn.Module] = Gated) -> Model:
    torch.manual_seed(2)
    return tiny.describe(tiny.TinyModel(block(), block(), width=WIDTH).eval(), width=WIDTH)


def linear_count(program: Program, method: str) -> int:
    nodes = program.methods[method].exported.graph.nodes
    return sum(node.target is torch.ops.aten.linear.default for node in nodes)


def weight_bytes(program: Program) -> int:
    return sum(row.nbytes for row in program.weights.values())


def fuses(before: Any, after: Any) -> bool:
    """Hold a rewrite of two gated layers to its numbers."""
    for method in BOTH:
        assert [linear_count(one, method) for one in (before, after)] == [2 * 5 + 1, 2 * 4 + 1]
        assert program_cost(after)[method].flops == program_cost(before)[method].flops
    stacks = [row for row in after.weights.values() if "gate_up" in row.key]
    assert stacks
    assert all(row.users == ("decode", "prefill") for row in stacks), "methods share the stacks"
    return True


def keeps_bytes(before: Any, after: Any) -> bool:
    assert weight_bytes(after) == weight_bytes(before)
    return fuses(before, after)


@pytest.mark.parametrize("block", [Gated, Spelled, Clamped], ids=lambda one: one.__name__)
def test_two_linears_become_one(block: Callable[[], nn.Module]) -> None:
    check_pass(FuseGateUp(), model(block), matches=BOTH, effect=keeps_bytes)


@pytest.mark.parametrize("bias", [(True, True), (False, True)], ids=str)
def test_biases_are_stacked_and_missing_ones_are_zeros(bias: tuple[bool, bool]) -> None:
    check_pass(FuseGateUp(), model(lambda: Gated(bias)), matches=BOTH, effect=fuses)


def test_quantized_projections_are_stacked_with_scales_and_zero_points() -> None:
    check_pass(FuseGateUp(), model(), after=QUANTIZED, matches=BOTH, effect=keeps_bytes)


def test_the_default_model_has_four_linears_a_layer_with_both_fusions() -> None:
    def effect(before: Any, after: Any) -> bool:
        for method in BOTH:
            assert [linear_count(one, method) for one in (before, after)] == [4 * 5 + 1, 4 * 4 + 1]
        return weight_bytes(before) == weight_bytes(after)

    after = "static-kv-cache,swap-sdpa,capture,fuse-qkv"
    check_pass(FuseGateUp(), default_model(), after=after, matches={"prefill": 4, "decode": 4}, effect=effect)


def test_the_quantized_default_model_stores_the_same_bytes() -> None:
    plain = Source(default_model()).transform("quantize{recipe=8da4w},static-kv-cache,swap-sdpa").capture()
    base = plain.rewrite("last-token-logits").program
    fused = plain.rewrite("last-token-logits,fuse-qkv,fuse-gate-up").program
    for method in BOTH:
        assert [linear_count(one, method) for one in (base, fused)] == [4 * 7 + 1, 4 * 4 + 1]
    assert 0 <= weight_bytes(base) - weight_bytes(fused) <= 1024, "what no node uses goes, nothing comes"


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a low-rank adapter": (LowRank, "its factors combine the results of 3 linears"),
    "two inputs": (OtherInput, r"aten\.linear\.default .* and aten\.linear\.default .* have different inputs"),
    "another user of a weight": (OneUsed, r"uses the weight blocks\.0\.gate\.weight too; it would be stored twice"),
    "no activation": (Bilinear, "it found no candidate"),
    "a sum": (Ungated, "it found no candidate"),
    "one linear": (Packed, "it found no candidate"),
}


@pytest.mark.parametrize(("block", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_stacked_is_refused(block: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        tiny.captured(model(block)).rewrite("fuse-gate-up")


def test_a_linear_goes_into_one_stack_only() -> None:
    captured = tiny.captured(model(Squared)).rewrite("fuse-gate-up")
    assert len(captured.results[-1].matches) == 4
    assert {one.reason for one in captured.results[-1].refusals} == {
        "one of its linears has become part of another stack"
    }


@pytest.mark.parametrize("after", ["static-kv-cache,swap-sdpa,capture", QUANTIZED], ids=["fp32", "8da4w"])
def test_the_oracle_sees_gate_and_up_exchanged(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_concatenate", lambda *weights: torch.cat(weights[::-1]))
    with pytest.raises(VerificationError, match=r"after pass fuse-gate-up"):
        check_pass(FuseGateUp(), model(), after=after, matches=BOTH)


def stored(pte: PteFile) -> int:
    return sum(pte.weights.values()) + sum(pte.constants.values())


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["", "quantize{recipe=8da4w},"], ids=["fp32", "8da4w"])
def test_xnnpack_takes_it_whole_and_stores_it_once(quantize: str, tmp_path: Path) -> None:
    captured = tiny.captured(model(), f"{quantize}static-kv-cache,swap-sdpa")
    files = {}
    for name, passes in (("plain", ""), ("fused", "fuse-gate-up")):
        (captured.rewrite(passes) if passes else captured).lower("xnnpack").save(tmp_path / name)
        files[name] = read_pte(tmp_path / name / "model.pte")
    plain, fused = files["plain"], files["fused"]
    assert stored(fused) <= 1.02 * stored(plain)
    assert sum(fused.methods["decode"].delegates.values()) <= sum(plain.methods["decode"].delegates.values())
    assert not any("linear" in name or "mm" in name for one in fused.methods.values() for name in one.operators)
