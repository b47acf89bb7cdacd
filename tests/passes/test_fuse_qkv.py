"""`fuse-qkv` makes one linear of an attention's projections, once for all methods, and only where that is exact."""

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
from triptych.compiler.pass_kinds import Refusal
from triptych.compiler.program import Program
from triptych.compiler.stages import Captured
from triptych.compiler.targets.pte import PteFile, read_pte
from triptych.errors import PipelineError, VerificationError
from triptych.passes.fuse_qkv import FuseQKV
from triptych.testing import check_pass, default_model

QUANTIZED = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture"
BOTH = {"prefill": 2, "decode": 2}
WIDTH = 64


class Separate(nn.Module):
    """Causal self-attention with a linear for each of its three projections."""

    def __init__(self, width: int = WIDTH, heads: int = 4, kv_heads: int = 2, bias: tuple[bool, ...] = (False,) * 3):
        super().__init__()
        self.size = width // heads
        self.q = nn.Linear(width, width, bias=bias[0])
        self.k = nn.Linear(width, kv_heads * self.size, bias=bias[1])
        self.v = nn.Linear(width, kv_heads * self.size, bias=bias[2])
        self.out = nn.Linear(width, width, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three projections, flat."""
        return self.q(x), self.k(x), self.v(x)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values [B, H, S, D]."""
        return tuple(part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in self.project(x))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(attended.transpose(1, 2).flatten(-2))


class Normed(Separate):
    """Norms and rotates queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(self.size) for _ in range(2))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = super().heads(x)
        query, key = self.norms[0](query), self.norms[1](key)
        return query + 0.5 * query.roll(1, -1), torch.cat((-key[..., 8:], key[..., :8]), -1), value


class Flat(Separate):
    """Looks at its queries as one row of numbers, which slices of a wider result cannot be."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().project(x)
        length = query.shape[1]
        return query.view(1, length * WIDTH).mul(2).view(1, length, WIDTH), key, value


class KeysAreValues(Separate):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = self.k(x)
        return self.q(x), key, key


class OtherValues(Separate):
    """Its values see another input than its queries and keys."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x.tanh())


class LowRank(Separate):
    """Adds a low-rank adapter to its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x) + self.b(self.a(x)), self.k(x), self.v(x)


class Tied(Separate):
    """Its output projection is its query projection, transposed in meaning only."""

    def __init__(self) -> None:
        super().__init__()
        self.out.weight = self.q.weight


class Computed(Separate):
    """Its query projection is computed in every call."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return F.linear(x, self.q.weight * 0.5), self.k(x), self.v(x)


class Writing(Separate):
    """Changes its input between the projections."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.clone()
        query = self.q(x)
        x[..., :8].mul_(0.5)
        return query, self.k(x), self.v(x)


class OneBlock(Separate):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.q(x), self.q(x)


class AllDiffer(Separate):
    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x.tanh()), self.v(x.sin())


class OneWeight(Separate):
    """Two calls of one linear."""

    def __init__(self) -> None:
        super().__init__(kv_heads=4)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.q(x), self.v(x)


def model(attention: Callable[[], nn.Module] = Separate) -> Model:
    torch.manual_seed(1)
    return tiny.tiny(attention(), attention(), width=WIDTH)


def linear_count(program: Program, method: str) -> int:
    nodes = program.methods[method].exported.graph.nodes
    return sum(node.target is torch.ops.aten.linear.default for node in nodes)


def weight_bytes(program: Program) -> int:
    return sum(row.nbytes for row in program.weights.values())


def fuses(linears_before: int, linears_after: int) -> Callable[[Any, Any], bool]:
    """Hold a rewrite to its numbers: linears of prefill and decode, the same bytes and the same arithmetic."""

    def effect(before: Any, after: Any) -> bool:
        for method in BOTH:
            assert [linear_count(one, method) for one in (before, after)] == [linears_before, linears_after]
            assert program_cost(after)[method].flops == program_cost(before)[method].flops
        stacks = [row for row in after.weights.values() if "qkv" in row.key and "vision" not in row.key]
        assert stacks
        assert all({"prefill", "decode"} <= set(row.users) for row in stacks), "methods share the stacks"
        return True

    return effect


def keeps_bytes(before: Any, after: Any) -> bool:
    assert weight_bytes(after) == weight_bytes(before)
    return fuses(2 * 6 + 1, 2 * 4 + 1)(before, after)


@pytest.mark.parametrize("attention", [Separate, Normed, Flat], ids=lambda one: one.__name__)
def test_three_linears_become_one(attention: Callable[[], nn.Module]) -> None:
    check_pass(FuseQKV(), model(attention), matches=BOTH, effect=keeps_bytes)


def test_attention_without_a_cache_too() -> None:
    captured = tiny.captured(model(), "")
    embeds, start = torch.randn(1, 5, WIDTH), torch.tensor([0])
    rewritten = captured.rewrite("fuse-qkv").program
    assert keeps_bytes(captured.program, rewritten)
    with torch.no_grad():
        wanted = captured.program.methods["prefill"].exported.module()(embeds, start)
        got = rewritten.methods["prefill"].exported.module()(embeds, start)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_aten_form_of_a_cache_too() -> None:
    check_pass(FuseQKV(), model(), after="static-kv-cache,capture", matches=BOTH, effect=keeps_bytes)


def test_the_legalized_forms_too() -> None:
    after = "static-kv-cache,swap-sdpa,capture,legalize-aten"
    check_pass(FuseQKV(), model(), after=after, matches=BOTH, effect=keeps_bytes)


@pytest.mark.parametrize("bias", [(True, True, True), (True, False, True)], ids=str)
def test_biases_are_stacked_and_missing_ones_are_zeros(bias: tuple[bool, ...]) -> None:
    check_pass(FuseQKV(), model(lambda: Separate(bias=bias)), matches=BOTH, effect=fuses(13, 9))


def test_quantized_projections_are_stacked_with_scales_and_zero_points() -> None:
    check = check_pass(FuseQKV(), model(), after=QUANTIZED, matches=BOTH, effect=keeps_bytes)
    assert isinstance(check.after, Program)
    parts = {
        row.key: tuple(row.uses[0].tensor.shape) for row in check.after.weights.values() if "0.attention.qkv" in row.key
    }
    assert list(parts.values()) == [(128, 64), (128, 2), (128, 2)]
    chains = [node for node in check.after.methods["decode"].exported.graph.nodes if "choose_qparams" in node.name]
    assert len(chains) == 2 * 4 + 1, "the input is quantized once for all three"


def test_the_default_model() -> None:
    effect = fuses(4 * 7 + 1, 4 * 5 + 1)
    check_pass(FuseQKV(), default_model(), matches={"vision_encoder": 3, "prefill": 4, "decode": 4}, effect=effect)


@pytest.mark.parametrize(("attention", "count"), [(KeysAreValues, 5), (OtherValues, 6)])
def test_two_linears_over_one_input_become_one(attention: Callable[[], nn.Module], count: int) -> None:
    effect = fuses(2 * count + 1, 2 * (count - 1) + 1)
    check_pass(FuseQKV(), model(attention), matches=BOTH, effect=effect)


def test_layers_of_one_attention_share_one_stack() -> None:
    attention = Separate()
    program = tiny.captured(tiny.tiny(attention, attention, width=WIDTH), "").rewrite("fuse-qkv").program
    stacks = [row for row in program.weights.values() if "qkv" in row.key]
    assert [row.users for row in stacks] == [("decode", "prefill")]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a linear for all three": (lambda: tiny.TinyAttention(WIDTH), "come from one linear already"),
    "a low-rank adapter": (LowRank, r"its query combines the results of 2 linears, linear(_\d+)? and linear_\d+ first"),
    "another user of a weight": (
        Tied,
        r"aten\.linear\.default .* uses the weight blocks\.0\.attention\.(q|out)\.weight too; it would be stored twice",
    ),
    "a computed weight": (Computed, r"the weight of aten\.linear\.default .* is aten\.mul\.Tensor .*, no parameter"),
    "a write in between": (Writing, r"between its linears aten\.mul_\.Tensor .* writes into their input"),
    "three inputs": (AllDiffer, "its projections have different inputs"),
    "one weight twice": (OneWeight, "two of its linears have one weight"),
}


@pytest.mark.parametrize(("attention", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_stacked_is_refused(attention: Callable[[], nn.Module], reason: str) -> None:
    captured = tiny.captured(model(attention))
    with pytest.raises(PipelineError, match=reason):
        captured.rewrite("fuse-qkv")


def refusals(captured: Captured) -> list[Refusal]:
    return list(captured.rewrite("fuse-qkv").results[-1].refusals)


def test_one_refusal_does_not_keep_others_from_being_fused() -> None:
    captured = tiny.captured(tiny.tiny(LowRank(), Separate(), width=WIDTH)).rewrite("fuse-qkv")
    assert [match.layer for match in captured.results[-1].matches] == ["blocks.1", "blocks.1"]
    assert len(captured.results[-1].refusals) == 2


def test_weights_of_different_formats_are_refused() -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.utils import unwrap_tensor_subclass

    attention = Separate()
    for name, group in (("q", 32), ("k", 32), ("v", 64)):
        config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(group))
        quantize_(nn.ModuleList([attention.get_submodule(name)]), config)
    unwrap_tensor_subclass(attention)
    with pytest.raises(PipelineError, match=r"its weights have different formats: .*\[1, 32\].* and .*\[1, 64\]"):
        tiny.captured(tiny.tiny(attention, width=WIDTH)).rewrite("fuse-qkv")


def test_quantized_and_plain_projections_have_different_inputs() -> None:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.utils import unwrap_tensor_subclass

    attention = Separate()
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(nn.ModuleList([attention.q]), config)
    unwrap_tensor_subclass(attention)
    program = tiny.captured(tiny.tiny(attention, width=WIDTH)).rewrite("fuse-qkv").program
    names = [row.key for row in program.weights.values()]
    assert any(".q." in name for name in names), "the quantized one stays"
    assert "blocks.0.attention.qkv.weight" in names, "keys and values become one"


@pytest.mark.parametrize("after", ["static-kv-cache,swap-sdpa,capture", QUANTIZED], ids=["fp32", "8da4w"])
def test_the_oracle_sees_a_stack_in_the_wrong_order(after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_concatenate", lambda *weights: torch.cat(weights[::-1]))
    with pytest.raises(VerificationError, match=r"after pass fuse-qkv"):
        check_pass(FuseQKV(), model(lambda: Separate(kv_heads=4)), after=after, matches=BOTH)


def stored(pte: PteFile) -> int:
    return sum(pte.weights.values()) + sum(pte.constants.values())


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["", "quantize{recipe=8da4w},"], ids=["fp32", "8da4w"])
def test_xnnpack_takes_it_whole_and_stores_it_once(quantize: str, tmp_path: Path) -> None:
    wide = 192
    captured = tiny.captured(tiny.tiny(Separate(wide), width=wide), f"{quantize}static-kv-cache,swap-sdpa")
    files = {}
    for name, passes in (("plain", ""), ("fused", "fuse-qkv")):
        (captured.rewrite(passes) if passes else captured).lower("xnnpack").save(tmp_path / name)
        files[name] = read_pte(tmp_path / name / "model.pte")
    plain, fused = files["plain"], files["fused"]
    assert stored(fused) <= 1.02 * stored(plain)
    assert sum(fused.methods["decode"].delegates.values()) <= sum(plain.methods["decode"].delegates.values())
    assert not any("linear" in name or "mm" in name for one in fused.methods.values() for name in one.operators)
