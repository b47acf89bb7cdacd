"""`remove-redundant-permutes` takes away permutes that cancel, and computes the same whatever stands around them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests.compiler import tiny
from tests.passes.graphs import assert_same, exported, operators, refusals, rewritten
from tests.passes.random_layouts import DYNAMIC_AXIS, SHAPE, Chain, Step, steps
from triptych.compiler.permutations import PERMUTES, compose, inverse, permutation_of
from triptych.compiler.program import Program
from triptych.passes.remove_redundant_permutes import RemoveRedundantPermutes
from triptych.testing import check_pass, default_model

PASS = RemoveRedundantPermutes()
QUANTIZED = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture"


class Computes(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def permutes(program: ExportedProgram) -> int:
    return sum(node.target in PERMUTES for node in program.graph.nodes)


def in_program(program: Any) -> dict[str, int]:
    assert isinstance(program, Program)
    return {name: permutes(method.exported) for name, method in program.methods.items()}


def run(function: Callable[[Tensor], Any], shape: Sequence[int] = SHAPE) -> tuple[ExportedProgram, dict[str, str]]:
    """Rewrite `function` and hold the result to it."""
    module, x = Computes(function), torch.randn(*shape)
    program, log = rewritten(exported(module, x), PASS)
    assert_same(module, program, x)
    return program, refusals(log)


# ---------------------------------------------------------------------------------------------------- models


def test_no_permute_remains_in_a_decoder_layer_with_rotary_embeddings() -> None:
    check = check_pass(
        PASS,
        default_model(),
        matches={"vision_encoder": 2, "prefill": 38, "decode": 38},
        refuses={"^transpose$": "nothing cancels it"},
    )
    assert in_program(check.before) == {"vision_encoder": 13, "token_embedding": 0, "prefill": 32, "decode": 32}
    assert in_program(check.after) == {"vision_encoder": 13, "token_embedding": 0, "prefill": 0, "decode": 0}


@pytest.mark.parametrize("after", ["static-kv-cache,swap-sdpa,capture", QUANTIZED], ids=["fp32", "8da4w"])
def test_no_permute_remains_in_a_decoder_layer_without_rotary_embeddings(after: str) -> None:
    check = check_pass(PASS, tiny.tiny(), after=after, matches={"prefill": 8, "decode": 8})
    assert in_program(check.before) == {"token_embedding": 0, "prefill": 16, "decode": 16}
    assert in_program(check.after) == {"token_embedding": 0, "prefill": 0, "decode": 0}


def test_attention_without_the_neutral_operator_keeps_the_permutes_that_it_needs() -> None:
    check = check_pass(PASS, tiny.tiny(), after="static-kv-cache,capture", matches={"prefill": 8, "decode": 8})
    assert in_program(check.before) == {"token_embedding": 0, "prefill": 24, "decode": 24}
    assert in_program(check.after) == {"token_embedding": 0, "prefill": 8, "decode": 8}


# ---------------------------------------------------------------------------------------------------- composition


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps(), st.integers(0, 9), st.booleans())
def test_random_chains_compute_the_same(chain: list[Step], also: int, dynamic: bool) -> None:
    module = Chain(chain, also)
    try:
        program = exported(module, torch.randn(SHAPE), dynamic_axis=DYNAMIC_AXIS if dynamic else None)
    except (RuntimeError, ValueError):
        assume(False)  # torch cannot export a few of them with a dynamic size
    simpler, _ = rewritten(program, PASS)
    assert permutes(simpler) <= permutes(program)
    for size in (2, 5, 7) if dynamic else (5,):
        x = torch.randn(2, size, *SHAPE[2:], generator=torch.Generator().manual_seed(size))
        assert_same(module, simpler, x)
    _, again = rewritten(simpler, PASS)
    assert again.matches == []


@given(st.permutations(range(4)), st.permutations(range(4)))
@settings(max_examples=25, deadline=None)
def test_composition_is_what_torch_does(first: list[int], second: list[int]) -> None:
    x = torch.randn(2, 3, 4, 5)
    once = x.permute(compose(tuple(first), tuple(second)))
    assert torch.equal(once, x.permute(first).permute(second))
    assert torch.equal(x.permute(first).permute(inverse(tuple(first))), x)


@pytest.mark.parametrize(
    ("operation", "wanted"),
    [
        (lambda x: x.transpose(-1, 1), (0, 3, 2, 1)),
        (lambda x: x.movedim((0, 1), (2, 3)), (2, 3, 0, 1)),
        (lambda x: x.mT, (0, 1, 3, 2)),
        (lambda x: x.permute(1, 2, 3, 0), (1, 2, 3, 0)),
    ],
)
def test_permutations_are_read_off_operators(operation: Any, wanted: tuple[int, ...]) -> None:
    program = exported(Computes(operation), torch.randn(SHAPE))
    found = [permutation_of(node) for node in program.graph.nodes if permutation_of(node)]
    assert found == [wanted]


def test_a_permute_that_is_no_transpose_does_not_cancel_itself() -> None:
    cube = (3, 3, 3)  # shapes would not tell
    twice, _ = run(lambda x: x.permute(1, 2, 0).permute(1, 2, 0).exp(), cube)
    assert [node.args[1] for node in twice.graph.nodes if node.target in PERMUTES] == [[2, 0, 1]]
    thrice, _ = run(lambda x: x.permute(1, 2, 0).permute(1, 2, 0).permute(1, 2, 0).exp(), cube)
    assert permutes(thrice) == 0
    back, _ = run(lambda x: x.permute(1, 2, 0).permute(2, 0, 1).exp(), cube)
    assert permutes(back) == 0


def test_taking_equal_axes_for_an_inverse_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "triptych.passes.remove_redundant_permutes.compose",
        lambda first, second: tuple(range(len(first))) if first == second else compose(first, second),
    )
    with pytest.raises(AssertionError, match="not close"):
        run(lambda x: x.permute(1, 2, 0).permute(1, 2, 0).exp(), (3, 3, 3))


def test_forgetting_that_axes_have_moved_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor) -> Tensor:
        return x.transpose(0, 1).softmax(0).transpose(0, 1)

    run(function, (3, 3, 3))
    monkeypatch.setattr("triptych.compiler.reordering.AXIS_ARGUMENTS", {})
    with pytest.raises(AssertionError, match="not close"):
        run(function, (3, 3, 3))


# ---------------------------------------------------------------------------------------------------- what moves


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "pointwise": lambda x: (-x.transpose(1, 2)).exp().transpose(1, 2),
    "broadcast of a vector": lambda x: (x.transpose(1, 2) * torch.arange(3.0).view(3, 1, 1)).transpose(1, 2),
    "broadcast of an unsqueezed value": lambda x: (x.transpose(1, 2) * x[:, :, 0].unsqueeze(1)).transpose(1, 2),
    "cat and slice": lambda x: torch.cat((x.permute(3, 2, 0, 1)[1:], -x.permute(3, 2, 0, 1)), 0).permute(2, 3, 1, 0),
    "mean": lambda x: (x.transpose(1, 2) - x.transpose(1, 2).mean(1, keepdim=True)).transpose(1, 2),
    "softmax": lambda x: x.transpose(1, 3).softmax(1).transpose(1, 3),
    "split": lambda x: torch.cat(x.transpose(1, 3).chunk(2, dim=1)[::-1], 1).transpose(1, 3),
    "expand": lambda x: (x.transpose(1, 2)[:, :1].expand(2, 3, 5, 4) + 1).transpose(1, 2),
    "contiguous": lambda x: x.transpose(1, 2).contiguous().exp().transpose(1, 2),
    "layer norm": lambda x: torch.nn.functional.layer_norm(x.transpose(1, 2), [4]).transpose(1, 2),
    "masked fill": lambda x: x.transpose(1, 2).masked_fill(x.transpose(1, 2) > 0, 1.0).transpose(1, 2),
}


@pytest.mark.parametrize("function", MOVED.values(), ids=MOVED.keys())
def test_permutes_around_it_cancel(function: Callable[[Tensor], Tensor]) -> None:
    program, _ = run(function)
    assert permutes(program) == 0


def test_normalization_over_an_axis_that_would_move_keeps_its_permutes() -> None:
    program, _ = run(lambda x: torch.nn.functional.layer_norm(x.transpose(1, 3), [5]).transpose(1, 3))
    assert permutes(program) == 2


def test_a_sum_of_two_orders_keeps_one_permute() -> None:
    program, _ = run(lambda x: (x.permute(2, 1, 0) + x).permute(2, 1, 0) * 2, (3, 3, 3))
    assert permutes(program) == 1


def test_views_that_lead_back_go_away() -> None:
    program, _ = run(lambda x: (x * 2).view(10, 12).reshape(2, -1).unflatten(1, (5, 3, 4)).exp())
    assert operators(program) == {"aten.mul.Tensor": 1, "aten.exp.default": 1}


def test_what_gives_its_very_operand_goes_away() -> None:
    program, _ = run(lambda x: torch.dropout(x.contiguous().expand(SHAPE), 0.5, False)[:].exp())
    assert operators(program) == {"aten.exp.default": 1}


def test_a_view_behind_a_region_may_copy() -> None:
    program, _ = run(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2).exp().transpose(1, 2).reshape(2, -1))
    assert operators(program)["aten.view.default"] == 0


# ---------------------------------------------------------------------------------------------------- what stays


def test_a_copy_that_is_written_in_place_stays() -> None:
    def function(x: Tensor) -> Tensor:
        copy = x.clone()
        copy.mul_(2)
        return x + copy

    program, refused = run(function)
    assert operators(program)["aten.clone.default"] == 1
    assert refused["clone"].startswith("aten.mul_.Tensor (%mul_, ")
    assert refused["clone"].endswith("writes in place what it copies or what it makes")


def test_a_copy_of_what_is_written_later_stays() -> None:
    def function(x: Tensor) -> Tensor:
        doubled = x * 2
        copy = doubled.clone()
        doubled.add_(1)
        return doubled * copy

    program, _ = run(function)
    assert operators(program)["aten.clone.default"] == 1


def test_a_copy_that_the_caller_receives_stays() -> None:
    program, refused = run(lambda x: x.clone())
    assert operators(program) == {"aten.clone.default": 1}
    assert refused == {"clone": "the caller receives the copy"}


def test_a_copy_that_serves_nobody_goes_away() -> None:
    program, _ = run(lambda x: x.clone().exp() + x)
    assert operators(program)["aten.clone.default"] == 0


def test_a_region_that_is_written_in_place_stays() -> None:
    def function(x: Tensor) -> Tensor:
        turned = x.transpose(1, 2).contiguous()
        turned[:, :1].mul_(3)
        return (turned * 2).transpose(1, 2)

    program, refused = run(function)
    assert permutes(program) == 2
    assert "writes in place what aten.contiguous.default" in refused["transpose"]


def test_a_region_whose_strides_are_read_stays() -> None:
    def function(x: Tensor) -> Tensor:
        turned = (x.transpose(0, 1) * 2).transpose(0, 1).contiguous()
        return turned.as_strided((2, 2), (1, 5))

    def sees_the_order(x: Tensor) -> Tensor:
        return (x.transpose(0, 1) * 2).transpose(0, 1).as_strided((2, 2), (1, 5))

    run(function, (4, 5))
    program, refused = run(sees_the_order, (4, 5))
    assert permutes(program) == 2
    assert "depends on the strides of the result" in refused["transpose"]


def test_random_operators_stay_where_they_are() -> None:
    module = Computes(lambda x: torch.rand_like(x.transpose(0, 1)).transpose(0, 1))
    program, _ = rewritten(exported(module, torch.randn(3, 4)), PASS)
    assert permutes(program) == 2
