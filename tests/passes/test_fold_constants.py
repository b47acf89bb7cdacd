"""`fold-constants` computes at compile time what no call changes, where storing it is worth it."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from tests.passes.graphs import assert_same, exported, operators, refusals, rewritten
from triptych.compiler.program import Program
from triptych.errors import PipelineError
from triptych.passes.fold_constants import SMALL, FoldConstants
from triptych.testing import check_pass, default_model

PASS = FoldConstants()
WIDTH = 64


class Constant(nn.Module):
    """Multiplies with what a subclass computes from weights alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.row = nn.Parameter(torch.randn(WIDTH))

    def constant(self) -> Tensor:
        return self.weight.exp()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.constant()


def run(module: nn.Module, one: FoldConstants = PASS, calls: int = 1) -> tuple[Any, dict[str, str]]:
    x = torch.randn(3, WIDTH)
    program, log = rewritten(exported(module, x), one)
    for _ in range(calls):
        assert_same(module, program, x, tolerance=1e-4)
    return program, refusals(log)


def nbytes(program: Any) -> int:
    assert isinstance(program, Program)
    return sum(weight.nbytes for weight in program.weights.values())


# ---------------------------------------------------------------------------------------------------- models


def test_position_embeddings_and_positions_of_one_token_fold() -> None:
    check = check_pass(PASS, default_model(), matches={"vision_encoder": 1, "decode": 1})
    assert isinstance(check.before, Program)
    assert isinstance(check.after, Program)
    removed = {}
    for name in ("vision_encoder", "decode"):
        before, after = (operators(one.methods[name].exported) for one in (check.before, check.after))
        removed[name] = dict(before - after)
    assert removed == {"vision_encoder": {"aten.embedding.default": 1}, "decode": {"aten.arange.default": 1}}
    # The table of positions becomes the rows that were looked up; their indices go, and one position comes.
    assert nbytes(check.before) - nbytes(check.after) == 16 * 8 - 8


def test_methods_and_layers_share_what_they_compute_alike() -> None:
    check = check_pass(PASS, tiny.tiny(), after="static-kv-cache,capture", matches={"prefill": 2, "decode": 5})
    assert isinstance(check.after, Program)
    folded = [weight for weight in check.after.weights.values() if "folded" in weight.key]
    slots = [weight for weight in folded if weight.uses[0].tensor.numel() == tiny.CONTEXT_LENGTH]
    assert [(len(one.names), one.users) for one in slots] == [(1, ("decode", "prefill"))]


def test_quantized_weights_stay_quantized() -> None:
    quantized = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture"
    check = check_pass(PASS, tiny.tiny(), after=quantized, matches={"decode": 1})
    for program in (check.before, check.after):
        assert isinstance(program, Program)
        found = operators(program.methods["decode"].exported)
        assert found["torchao.dequantize_affine.default"] == 2 * 9 + 1


def test_dequantized_weights_stay_stored_as_they_are_when_spelled_out() -> None:
    class Dequantized(Constant):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("data", torch.randint(-8, 8, (WIDTH, WIDTH), dtype=torch.int8))
            self.data: Tensor

        def constant(self) -> Tensor:
            return self.data.float() * self.row

    program, refused = run(Dequantized())
    assert operators(program)["aten.mul.Tensor"] == 1
    assert refused["mul"] == "16384 bytes would be stored in place of 4352; limit is 1"
    assert operators(run(Dequantized(), FoldConstants(limit=4))[0])["aten.mul.Tensor"] == 0


# ---------------------------------------------------------------------------------------------------- sizes


def test_a_value_as_large_as_its_weight_takes_its_place() -> None:
    program, _ = run(Constant())
    assert operators(program) == {"aten.matmul.default": 1}
    assert sum(value.nbytes for value in program.state_dict.values()) == 4 * WIDTH * WIDTH


def test_two_values_of_one_weight_do_not_take_its_place() -> None:
    class Twice(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight.exp()) @ self.weight.sin()

    program, refused = run(Twice())
    assert refused == dict.fromkeys(("exp", "sin"), "16384 bytes would be stored in place of 0; limit is 1")
    assert operators(program)["aten.sin.default"] == 1


def test_what_is_too_large_is_computed_from_folded_values() -> None:
    class Outer(Constant):
        def constant(self) -> Tensor:
            small = self.row.exp()
            return small.unsqueeze(1) * small

    program, refused = run(Outer())
    assert operators(program)["aten.exp.default"] == 0
    assert operators(program)["aten.mul.Tensor"] == 1
    assert refused == {"mul": f"{4 * WIDTH * WIDTH} bytes would be stored in place of {4 * WIDTH}; limit is 1"}


def test_views_of_weights_stay() -> None:
    class Transposed(Constant):
        def constant(self) -> Tensor:
            return self.weight.t()

    program, refused = run(Transposed())
    assert operators(program)["aten.t.default"] == 1
    assert refused == {}


def test_a_limit_below_zero_is_an_error() -> None:
    with pytest.raises(PipelineError, match=r"limit is -1\.0; give a factor of 0 or more"):
        run(Constant(), FoldConstants(limit=-1.0))


# ---------------------------------------------------------------------------------------------------- not constant


def test_state_is_not_constant() -> None:
    class Counting(Constant):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.ones(1))
            self.count: Tensor

        def constant(self) -> Tensor:
            self.count.add_(1)
            return self.weight.exp() * (self.count * 2)

    module = Counting()
    program, _ = rewritten(exported(copy.deepcopy(module), torch.randn(3, WIDTH)), PASS)
    assert operators(program)["aten.exp.default"] == 0
    assert operators(program)["aten.mul.Tensor"] == 2
    x, runner = torch.randn(3, WIDTH), program.module()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(runner(x), module(x))


def test_memory_that_is_written_is_not_constant() -> None:
    class Writing(Constant):
        def forward(self, x: Tensor) -> Tensor:
            memory = self.row * 2
            memory.add_(x[0])
            return x * memory

    program, _ = run(Writing(), calls=2)
    assert operators(program)["aten.mul.Tensor"] == 2


def test_random_values_are_not_constant() -> None:
    class Random(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(1) + torch.rand_like(self.row)

    program, log = rewritten(exported(Random(), torch.randn(3, WIDTH)), PASS)
    assert log.matches == []
    assert operators(program)["aten.rand_like.default"] == 1


def test_a_constant_that_the_caller_receives_stays() -> None:
    class Returned(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return self.row * 2

    program, refused = run(Returned())
    assert refused == {"mul": "the caller receives it"}
    assert operators(program)["aten.mul.Tensor"] == 1


def test_small_values_fold_without_a_weight() -> None:
    class Positions(Constant):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.arange(WIDTH).float().sin() + torch.arange(SMALL).sum()

    program, _ = run(Positions())
    assert operators(program) == {"aten.mul.Tensor": 1, "aten.add.Tensor": 1}
