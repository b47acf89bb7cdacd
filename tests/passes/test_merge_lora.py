"""`merge-lora` recognizes adapters by what they compute, and merges them in the methods that it is told to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from tests.passes.graphs import assert_same, exported, operators, refusals, rewritten
from triptych.compiler.cost import method_cost
from triptych.compiler.model import Model
from triptych.compiler.program import Program
from triptych.errors import PipelineError, VerificationError
from triptych.passes.merge_lora import MergeLoRA
from triptych.testing import check_pass, default_model

PASS = MergeLoRA()
RANK = 4


class Adapted(nn.Module):
    """A linear with an adapter beside it; subclasses say how the sum is written."""

    def __init__(self, linear: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        self.base = linear
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = 2.0
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.up(self.down(self.dropout(x))) * self.scale
        return adapted


class ScaledBehind(Adapted):
    """The order of the sum and of the scale exchanged, and a cast that does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = 0.5 * self.up(self.down(x.to(self.down.weight.dtype))) + self.base(x)
        return adapted


class ScaledByTensor(Adapted):
    def __init__(self, linear: nn.Linear, rank: int = RANK) -> None:
        super().__init__(linear, rank)
        self.register_buffer("alpha", torch.tensor(3.0))
        self.alpha: Tensor

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.up(self.down(x * 2) * self.alpha) / 4
        return adapted


class AddedWithAlpha(Adapted):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.base(x), self.up(self.down(x)), alpha=-1.5)


class AdaptedTwice(Adapted):
    def __init__(self, linear: nn.Linear, rank: int = RANK) -> None:
        super().__init__(linear, rank)
        self.other = Adapted(linear, rank + 1)

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor = self.base(x) + self.up(self.down(x)) * self.scale
        return first + self.other.up(self.other.down(x)) * 0.25


class Attention(tiny.TinyAttention):
    """Attention whose projections are adapted."""

    def __init__(self, form: Callable[[nn.Linear], nn.Module] = Adapted) -> None:
        super().__init__()
        self.qkv = form(self.qkv)  # type: ignore[assignment]
        self.out = form(self.out)  # type: ignore[assignment]


def adapted(form: Callable[[nn.Linear], nn.Module] = Adapted) -> Model:
    torch.manual_seed(0)
    return tiny.tiny(Attention(form), Attention(form))


def linears(program: Any, method: str) -> int:
    assert isinstance(program, Program)
    return operators(program.methods[method].exported)["aten.linear.default"]


def run(module: nn.Module, features: int = 8) -> dict[str, str]:
    x = torch.randn(3, features)
    program, log = rewritten(exported(module, x), PASS)
    assert_same(module, program, x)
    assert log.matches == []
    return refusals(log)


# ---------------------------------------------------------------------------------------------------- merged


@pytest.mark.parametrize("form", [Adapted, ScaledBehind, ScaledByTensor, AddedWithAlpha])
def test_adapters_are_merged_however_they_are_written(form: Callable[[nn.Linear], nn.Module]) -> None:
    check = check_pass(PASS, adapted(form), matches={"prefill": 4, "decode": 4})
    for method in ("prefill", "decode"):
        assert (linears(check.before, method), linears(check.after, method)) == (9 + 2 * 4, 9)


def test_merging_frees_the_adapters_and_their_arithmetic() -> None:
    check = check_pass(PASS, adapted(), matches={"prefill": 4, "decode": 4})
    assert isinstance(check.before, Program)
    assert isinstance(check.after, Program)
    adapter = RANK * (tiny.WIDTH + 3 * tiny.WIDTH) + RANK * (tiny.WIDTH + tiny.WIDTH)
    before, after = (method_cost(one, "decode") for one in (check.before, check.after))
    assert before.flops - after.flops == 2 * 2 * adapter
    assert before.constant_bytes - after.constant_bytes == 2 * 4 * adapter
    merged = [weight for weight in check.after.weights.values() if "merged" in weight.key]
    assert [weight.users for weight in merged] == [("decode", "prefill")] * 4


def test_several_adapters_of_one_linear_are_merged_in_turn() -> None:
    check = check_pass(PASS, adapted(AdaptedTwice), matches={"prefill": 8, "decode": 8})
    assert linears(check.after, "decode") == 9


def test_one_method_may_keep_its_adapters() -> None:
    check = check_pass(
        MergeLoRA(methods="prefill"),
        adapted(),
        matches={"prefill": 4},
        refuses={"add": "methods=prefill leaves decode as it is"},
    )
    assert (linears(check.after, "prefill"), linears(check.after, "decode")) == (9, 17)
    assert isinstance(check.after, Program)
    assert check.after.weights["blocks.0.attention.out.base.weight"].users == ("decode",)


def test_the_merged_weight_has_the_dtype_of_the_weight() -> None:
    class Mixed(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            delta: Tensor = self.up(self.down(x.float()))
            total: Tensor = self.base(x) + delta
            return total

    torch.manual_seed(0)
    module = Mixed(nn.Linear(8, 8).to(torch.bfloat16))
    x = torch.randn(3, 8).to(torch.bfloat16)
    program, log = rewritten(exported(module, x), PASS)
    assert len(log.matches) == 1
    (merged,) = (value for name, value in program.state_dict.items() if name.endswith("merged_weight"))
    assert merged.dtype == torch.bfloat16
    with torch.no_grad():
        got, wanted = program.module()(x), module(x)
    assert got.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("factor", [0.0, 1.5])
def test_a_wrong_scale_is_seen(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    def wrong(scale: float, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return weight + factor * scale * (up @ down)

    monkeypatch.setattr("triptych.passes.merge_lora._merged", wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(PASS, adapted(), matches={"prefill": 4, "decode": 4})


# ---------------------------------------------------------------------------------------------------- refused


def test_a_model_without_adapters_has_nothing_to_merge() -> None:
    with pytest.raises(PipelineError, match="matched nothing: it found no candidate"):
        check_pass(PASS, default_model(), matches=0)


def test_quantized_weights_are_refused() -> None:
    quantized = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture"
    model = adapted(lambda linear: Adapted(linear, rank=32))
    with pytest.raises(PipelineError, match=r"the adapted linear is torchao\.dequantize_affine.*merge before quantiz"):
        check_pass(PASS, model, after=quantized, matches=0)


def test_active_dropout_is_refused() -> None:
    class Dropping(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            adapted: Tensor = self.base(x) + self.up(self.down(F.dropout(x, 0.25, training=True)))
            return adapted

    program, log = rewritten(exported(Dropping(nn.Linear(8, 8)), torch.randn(3, 8)), PASS)
    assert refusals(log) == {"add": "dropout with p=0.25 is active; put the model in evaluation mode"}
    assert operators(program)["aten.linear.default"] == 3


def test_an_adapter_with_a_bias_is_refused() -> None:
    module = Adapted(nn.Linear(8, 8))
    module.up = nn.Linear(RANK, 8)
    assert run(module)["add"].endswith("of the adapter has a bias")


def test_an_adapter_of_another_input_is_refused() -> None:
    class Elsewhere(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            adapted: Tensor = self.base(x) + self.up(self.down(x.exp()))
            return adapted

    reason = run(Elsewhere(nn.Linear(8, 8)))["add"]
    assert reason.startswith("the adapter reads aten.exp.default")
    assert reason.endswith("the linear %x")


def test_a_weight_that_is_used_elsewhere_is_refused() -> None:
    class Shared(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            adapted: Tensor = self.base(x) + self.up(self.down(x))
            return adapted + self.base(x * 2)

    reason = run(Shared(nn.Linear(8, 8)))["add"]
    assert "uses the weight too; merging would store 256 bytes more" in reason


def test_a_result_that_is_used_without_the_adapter_is_refused() -> None:
    class Both(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            plain: Tensor = self.base(x)
            return (plain + self.up(self.down(x))) * plain

    assert "uses the result without the adapter" in run(Both(nn.Linear(8, 8)))["add"]


def test_an_input_that_is_written_in_place_is_refused() -> None:
    class Writing(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            value = x * 2
            plain = self.base(value)
            value.view(-1).add_(1)
            adapted: Tensor = plain + self.up(self.down(value))
            return adapted

    assert run(Writing(nn.Linear(8, 8)))["add"].endswith("which both read, is written in place")


def test_two_linears_that_are_no_adapter_are_left() -> None:
    class Activated(Adapted):
        def forward(self, x: Tensor) -> Tensor:
            adapted: Tensor = self.base(x) + self.up(self.down(x).relu())
            return adapted

    assert run(Activated(nn.Linear(8, 8))) == {}
