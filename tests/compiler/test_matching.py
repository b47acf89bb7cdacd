"""A pattern fits where its operators, literals and kinds of wildcards do; elsewhere the reason says what does not."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from tests.compiler.rules import (
    DropAddZero,
    FeedForward,
    FuseLinears,
    GatedSilu,
    PlainAdd,
    S,
    applied,
    captured,
    of_function,
    reasons,
    targets,
)
from triptych.compiler.manager import run_program
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.rewrite_rule import RewriteRule, RuleMatch

aten = torch.ops.aten


def test_a_rule_rewrites_what_check_allows_and_says_why_not_the_rest() -> None:
    program = of_function(lambda module, x: (x + 0) * (x + 1.5) + 0.0, (3,))
    rewritten, result = applied(program, DropAddZero(), torch.randn(3))
    assert targets(rewritten) == ["aten.add.Tensor", "aten.mul.Tensor"]
    assert [match.where for match in result.matches] == ["add", "add_2"]
    (refusal,) = result.refusals
    assert (refusal.where, refusal.reason) == ("add_1", "adds 1.5, not 0")
    assert refusal.line is not None
    assert refusal.line.startswith("rules.py:")


def test_a_method_may_return_what_a_match_leaves_of_its_input() -> None:
    program = of_function(lambda module, x: x + 0, (3,))
    rewritten, _ = applied(program, DropAddZero(), torch.randn(3))
    assert targets(rewritten) == []


def test_a_tensor_where_a_number_is_wanted_is_a_near_miss() -> None:
    program = of_function(lambda module, x, y: x + y, (3,), (3,))
    assert reasons(program, DropAddZero()) == [
        "operand 1 (other) of aten.add.Tensor (%add) is %y, the pattern takes zero: float"
    ]


@dataclass(frozen=True)
class NormOfEps(RewriteRule):
    """Layer norm with one eps only, over all of the last axis."""

    name: ClassVar[str] = "norm-of-eps"
    eps: float = 1e-5

    def pattern(self, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return aten.layer_norm.default(x, shape, weight, bias, self.eps)

    def replacement(self, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        normed = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + self.eps)
        return normed if weight is None or bias is None else normed * weight + bias


def test_a_constant_is_compared_and_performance_switches_are_not() -> None:
    module = nn.Sequential(nn.LayerNorm(4, eps=1e-6), nn.LayerNorm(4))
    program = captured(module.eval(), (3, 4))
    rewritten, result = applied(program, NormOfEps(), torch.randn(3, 4))
    assert [match.where for match in result.matches] == ["layer_norm_1"]
    assert result.refusals[0].reason == (
        "operand 4 (eps) of aten.layer_norm.default (%layer_norm) is 1e-06, the pattern has 1e-05"
    )
    assert targets(rewritten).count("aten.layer_norm.default") == 1


def test_a_performance_switch_that_the_pattern_spells_out_is_compared() -> None:
    @dataclass(frozen=True)
    class OnCudnn(NormOfEps):
        name: ClassVar[str] = "on-cudnn"

        def pattern(self, x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return aten.layer_norm.default(x, shape, weight, bias, cudnn_enable="sometimes")

    (reason,) = reasons(captured(nn.LayerNorm(4).eval(), (3, 4)), OnCudnn())
    assert reason.startswith("operand 5 (cudnn_enable) of aten.layer_norm.default (%layer_norm) is ")
    assert reason.endswith(", the pattern has 'sometimes'")


def test_an_option_of_the_rule_reaches_its_pattern() -> None:
    program = captured(nn.LayerNorm(4, eps=1e-6).eval(), (3, 4))
    assert len(applied(program, NormOfEps(eps=1e-6), torch.randn(3, 4))[1].matches) == 1


def test_an_optional_tensor_is_bound_to_none_where_the_operand_is_left_out() -> None:
    program = captured(nn.LayerNorm(4, elementwise_affine=False).eval(), (3, 4))
    assert len(applied(program, NormOfEps(), torch.randn(3, 4))[1].matches) == 1


def test_defaults_and_keywords_are_spelled_out_on_both_sides() -> None:
    program = of_function(lambda module, x, y: torch.add(x + y, y, alpha=2), (3,), (3,))
    rewritten, result = applied(program, PlainAdd(), torch.randn(3), torch.randn(3))
    assert [match.where for match in result.matches] == ["add"]
    assert result.refusals[0].reason == "operand 2 (alpha) of aten.add.Tensor (%add_1) is 2, the pattern has 1"
    assert "aten.add.Tensor" in targets(rewritten)


@dataclass(frozen=True)
class AnySum(RewriteRule):
    """A packet stands for all its overloads."""

    name: ClassVar[str] = "any-sum"

    def pattern(self, x: Tensor) -> Tensor:
        return aten.sum(x)

    def replacement(self, x: Tensor) -> Tensor:
        return x.mean() * x.numel()


def test_a_packet_matches_every_overload_that_takes_its_operands() -> None:
    program = of_function(lambda module, x: (x.sum(), x.sum(0)), (3, 4), outputs=2)
    _, result = applied(program, AnySum(), torch.randn(3, 4))
    assert [match.where for match in result.matches] == ["sum_1"]
    assert "aten.sum.dim_IntList needs dim" in result.refusals[0].reason


@pytest.mark.parametrize("swapped", [False, True])
def test_operands_of_commutative_operators_fit_in_both_orders(swapped: bool) -> None:
    def gated(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return y * F.silu(x) if swapped else F.silu(x) * y

    rewritten, _ = applied(of_function(gated, (3,), (3,)), GatedSilu(), torch.randn(3), torch.randn(3))
    assert "aten.silu.default" not in targets(rewritten)


@dataclass(frozen=True)
class TimesItsRelu(RewriteRule):
    """x * relu(x) is relu(x) squared."""

    name: ClassVar[str] = "times-its-relu"

    def pattern(self, x: Tensor) -> Tensor:
        return aten.mul.Tensor(x, aten.relu.default(x))

    def replacement(self, x: Tensor) -> Tensor:
        return torch.square(torch.relu(x))


def test_the_matcher_takes_back_what_it_bound_in_the_wrong_order() -> None:
    program = of_function(lambda module, x: torch.relu(x.sin()) * x.sin(), (3,))
    assert "%sin" in reasons(program, TimesItsRelu())[0]

    def one_sine(_: nn.Module, x: Tensor) -> Tensor:
        sine = x.sin()
        return torch.relu(sine) * sine

    applied(of_function(one_sine, (3,)), TimesItsRelu(), torch.randn(3))


@dataclass(frozen=True)
class AddOfProducts(RewriteRule):
    """xy + yz is y(x + z): the shared factor may stand in any of four places."""

    name: ClassVar[str] = "add-of-products"

    def pattern(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return aten.add.Tensor(aten.mul.Tensor(x, y), aten.mul.Tensor(y, z))

    def replacement(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return y * (x + z)


@pytest.mark.parametrize(
    "function",
    [
        lambda module, x, y, z: x * y + y * z,
        lambda module, x, y, z: y * x + y * z,
        lambda module, x, y, z: y * x + z * y,
        lambda module, x, y, z: x * y + z * y,
    ],
)
def test_backtracking_goes_through_nested_commutative_operators(function: Callable[..., Tensor]) -> None:
    program = of_function(function, (3,), (3,), (3,))
    rewritten, _ = applied(program, AddOfProducts(), *(torch.randn(3) for _ in range(3)))
    assert targets(rewritten) == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_operands_of_subtraction_and_of_scaled_addition_keep_their_order() -> None:
    @dataclass(frozen=True)
    class ScaledAdd(RewriteRule):
        name: ClassVar[str] = "scaled-add"

        def pattern(self, x: Tensor, y: Tensor) -> Tensor:
            return aten.add.Tensor(aten.relu.default(x), y, alpha=2)

        def replacement(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x) + 2 * y

    program = of_function(lambda module, x, y: torch.add(y, torch.relu(x), alpha=2), (3,), (3,))
    assert reasons(program, ScaledAdd()) == [
        "aten.relu.default expected as operand 0 (self) of aten.add.Tensor (%add), found %y"
    ]


def test_check_may_refuse_one_order_and_take_the_other() -> None:
    @dataclass(frozen=True)
    class AddBias(DropAddZero):
        name: ClassVar[str] = "add-bias"

        def pattern(self, x: Tensor, zero: Tensor) -> Tensor:  # type: ignore[override]
            return aten.add.Tensor(x, zero)

        def check(self, match: RuleMatch) -> str | None:
            return None if match.value("zero").dim() == 1 else f"%{match['zero'].name} is no vector"

        def replacement(self, x: Tensor, zero: Tensor) -> Tensor:  # type: ignore[override]
            return x - torch.neg(zero)

    program = of_function(lambda module, x, y: x + y, (3,), (2, 3))
    rewritten, _ = applied(program, AddBias(), torch.randn(3), torch.randn(2, 3))
    (sub,) = [node for node in rewritten.methods["main"].exported.graph.nodes if node.name == "sub"]
    assert [argument.name for argument in sub.args] == ["y", "neg"]


@dataclass(frozen=True)
class CatByAdding(RewriteRule):
    """cat of a relu and any other tensors: the relu is taken afterwards."""

    name: ClassVar[str] = "cat"

    def pattern(self, first: Tensor, *rest: Tensor) -> Tensor:
        return aten.cat.default([aten.relu.default(first), *rest], -1)

    def check(self, match: RuleMatch) -> str | None:
        assert isinstance(match["rest"], list)
        return None

    def replacement(self, first: Tensor, *rest: Tensor) -> Tensor:
        return torch.cat([torch.clamp(first, min=0.0), *rest], -1)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_variadic_parameter_takes_the_rest_of_a_list(count: int) -> None:
    program = of_function(lambda module, x, *rest: torch.cat([torch.relu(x), *rest], -1), *[(2, 3)] * count)
    rewritten, _ = applied(program, CatByAdding(), *(torch.randn(2, 3) for _ in range(count)))
    assert targets(rewritten) == ["aten.clamp.default", "aten.cat.default"]


def test_a_list_that_is_too_short_is_a_near_miss() -> None:
    @dataclass(frozen=True)
    class CatOfThree(CatByAdding):
        name: ClassVar[str] = "cat-of-three"

        def pattern(self, first: Tensor, *rest: Tensor) -> Tensor:
            return aten.cat.default([aten.relu.default(first), *rest, aten.relu.default(first)], -1)

    program = of_function(lambda module, x: torch.cat([torch.relu(x)], -1), (2, 3))
    assert "is [aten.relu.default (%relu" in reasons(program, CatOfThree())[0]
    assert "the pattern has a list of 2 or more" in reasons(program, CatOfThree())[0]


def test_a_repeated_wildcard_stands_for_one_value() -> None:
    @dataclass(frozen=True)
    class Square(RewriteRule):
        name: ClassVar[str] = "square"

        def pattern(self, x: Tensor) -> Tensor:
            return aten.mul.Tensor(x, x)

        def replacement(self, x: Tensor) -> Tensor:
            return torch.square(x)

    program = of_function(lambda module, x, y: (x * x) - (x * y), (3,), (3,))
    rewritten, result = applied(program, Square(), torch.randn(3), torch.randn(3))
    assert targets(rewritten) == ["aten.square.default", "aten.mul.Tensor", "aten.sub.Tensor"]
    assert result.refusals[0].reason == (
        "operand 1 (other) of aten.mul.Tensor (%mul_1) is %y, the pattern wants %x again"
    )


def test_two_operators_of_a_pattern_stand_for_two_nodes() -> None:
    @dataclass(frozen=True)
    class ProductOfRelus(RewriteRule):
        name: ClassVar[str] = "product-of-relus"

        def pattern(self, x: Tensor, y: Tensor) -> Tensor:
            return aten.mul.Tensor(aten.relu.default(x), aten.relu.default(y))

        def replacement(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(y) * torch.clamp(x, min=0.0)

    program = of_function(lambda module, x, y: torch.square(torch.relu(x)) + (one := torch.relu(y)) * one, (3,), (3,))
    (reason,) = reasons(program, ProductOfRelus())
    assert reason.startswith("operand 1 (other) of aten.mul.Tensor (%mul) is aten.relu.default (%relu_1, ")
    assert reason.endswith("which stands for another node of the pattern")


def test_an_input_may_be_a_value_within_the_match() -> None:
    @dataclass(frozen=True)
    class SumWithRelu(RewriteRule):
        name: ClassVar[str] = "sum-with-relu"

        def pattern(self, x: Tensor, y: Tensor) -> Tensor:
            return aten.add.Tensor(x, aten.relu.default(y))

        def replacement(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.clamp(y, min=0.0) + x

    program = of_function(lambda module, x: (one := torch.relu(x)) + one, (3,))
    rewritten, _ = applied(program, SumWithRelu(), torch.randn(3))
    assert targets(rewritten) == ["aten.relu.default", "aten.clamp.default", "aten.add.Tensor"]


def test_the_reason_is_that_of_the_attempt_that_came_furthest() -> None:
    program = of_function(lambda module, x, y: F.gelu(x) * y, (3,), (3,))
    (reason,) = reasons(program, GatedSilu())
    assert reason.startswith(
        "aten.silu.default expected as operand 0 (self) of aten.mul.Tensor (%mul), found aten.gelu.default (%gelu, "
        "rules.py:"
    )


# ---------------------------------------------------------------------------------------------------- several results


def test_two_results_are_fused_where_their_operand_is_one() -> None:
    program = captured(FeedForward().eval(), (S, 4), outputs=2)
    rewritten, result = applied(program, FuseLinears(), torch.randn(7, 4))
    assert [match.where for match in result.matches] == ["linear"]
    assert targets(rewritten).count("aten.linear.default") == 2
    assert [one.reason for one in result.refusals] == [
        "aten.linear.default expected as result 1 of the pattern, and there is no other over the same operands"
    ]


def test_the_fused_result_is_put_where_the_first_user_finds_it() -> None:
    program = captured(FeedForward().eval(), (S, 4), outputs=2)
    rewritten, _ = applied(program, FuseLinears(), torch.randn(2, 4))
    order = targets(rewritten)
    assert order.index("aten.split_with_sizes.default") < order.index("aten.silu.default")


def test_a_match_whose_input_comes_from_its_own_result_is_refused() -> None:
    @dataclass(frozen=True)
    class TwoLinears(FuseLinears):
        name: ClassVar[str] = "two-linears"

        def pattern(self, x: Tensor, first: Tensor, y: Tensor, second: Tensor) -> Any:  # type: ignore[override]
            return aten.linear.default(x, first), aten.linear.default(y, second)

        def replacement(self, x: Tensor, first: Tensor, y: Tensor, second: Tensor) -> Any:  # type: ignore[override]
            return F.linear(x, first), F.linear(y, second)

    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.SiLU(), nn.Linear(4, 4, bias=False)).eval()
    found = reasons(captured(module, (2, 4)), TwoLinears())
    assert "uses the result aten.linear.default (%linear" in found[0]
    assert "before the match's input aten.silu.default (%silu" in found[0]
    chained = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).eval()
    assert "is a result of the match and an input of it" in reasons(captured(chained, (2, 4)), TwoLinears())[0]


@dataclass(frozen=True)
class WriteBoth(RewriteRule):
    """Two writes into caches become one call of each in the other order."""

    name: ClassVar[str] = "write-both"

    def pattern(self, keys: Tensor, key: Tensor, values: Tensor, value: Tensor, start: Tensor) -> Any:
        first = torch.ops.triptych.update_cache.default(keys, key, start)
        return first, torch.ops.triptych.update_cache.default(values, value, start)

    def replacement(self, keys: Tensor, key: Tensor, values: Tensor, value: Tensor, start: Tensor) -> Any:
        torch.ops.triptych.update_cache(values, value, start)
        torch.ops.triptych.update_cache(keys, key, start)
        return None, None


def test_operators_without_a_result_can_be_matched_and_are_taken_away(tiny_program: Program) -> None:
    program = tiny_program
    rewritten, (result,) = run_program(program, [WriteBoth()])
    assert len(result.matches) == 4
    for method in ("prefill", "decode"):
        writes = [
            node.args[0].name
            for node in rewritten.methods[method].exported.graph.nodes
            if node.target is torch.ops.triptych.update_cache.default
        ]
        assert [name.rpartition("_")[2] for name in writes] == ["values", "keys", "values", "keys"]
    embeds = torch.randn(1, 5, tiny.WIDTH)
    start = torch.tensor([3])
    got, wanted = (ProgramRunner(one).run("prefill", embeds=embeds, start_pos=start) for one in (rewritten, program))
    torch.testing.assert_close(got["logits"], wanted["logits"])


@dataclass(frozen=True)
class Thirds(RewriteRule):
    """chunk in three, its parts taken one by one."""

    name: ClassVar[str] = "thirds"

    def pattern(self, x: Tensor, dim: int) -> Any:
        first, second, third = aten.chunk.default(x, 3, dim)
        return first, second, third

    def replacement(self, x: Tensor, dim: int) -> Any:
        size = x.shape[dim] // 3
        return tuple(x.narrow(dim, index * size, size) for index in range(3))


@dataclass(frozen=True)
class WholeThirds(Thirds):
    name: ClassVar[str] = "whole-thirds"

    def pattern(self, x: Tensor, dim: int) -> Any:
        return aten.chunk.default(x, 3, dim)


@pytest.mark.parametrize("rule", [Thirds(), WholeThirds()], ids=lambda rule: rule.name)
def test_results_with_parts_are_taken_apart_or_replaced_whole(tiny_program: Program, rule: RewriteRule) -> None:
    program = tiny_program
    inputs = torch.randn(1, 4, tiny.WIDTH), torch.tensor([0])
    rewritten, result = applied(program, rule, *inputs, method="prefill")
    assert len(result.matches) == 4
    assert "aten.chunk.default" not in targets(rewritten, "prefill")


def test_a_keyword_only_parameter_is_handed_on_by_name_and_check_sees_the_tensor_of_a_weight() -> None:
    @dataclass(frozen=True)
    class ZeroBias(RewriteRule):
        name: ClassVar[str] = "zero-bias"

        def pattern(self, x: Tensor, weight: Tensor, *, bias: Tensor) -> Tensor:
            return aten.linear.default(x, weight, bias)

        def check(self, match: RuleMatch) -> str | None:
            value = match.editor.tensor(match["bias"])
            return None if not value.any() else f"%{match['bias'].name} is not zero"

        def replacement(self, x: Tensor, weight: Tensor, *, bias: Tensor) -> Tensor:
            return F.linear(x, weight)

    module = FeedForward(bias=True).eval()
    nn.init.zeros_(module.up.bias)
    rewritten, result = applied(captured(module, (2, 4), outputs=2), ZeroBias(), torch.randn(2, 4))
    assert [match.where for match in result.matches] == ["linear_2"]
    assert [one.reason for one in result.refusals if "zero" in one.reason] == ["%p_gate_bias is not zero"]
    assert "up.bias" not in rewritten.weights
