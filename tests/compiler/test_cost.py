"""Costs: FLOPs against torch's own counter on eager modules, bytes and memory against numbers worked out by hand."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.compiler import tiny
from triptych.compiler.capture import bound_forward, capture
from triptych.compiler.cost import MethodCost, cost_delta, method_cost, program_cost
from triptych.compiler.model import EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.program import Program
from triptych.compiler.roles import OTHER
from triptych.compiler.stages import Source
from triptych.errors import UsageError
from triptych.manifest import DynamicDim, TensorSignature

S = DynamicDim("S", 2, 16)


def model_of(
    module: nn.Module, *shapes: tuple[int | DynamicDim, ...], dtype: str = "float32", outputs: int = 1
) -> Model:
    """Describe `module` with one method `run`, which takes inputs x0, x1 … of these shapes."""
    inputs = tuple(TensorSignature(f"x{number}", dtype, shape) for number, shape in enumerate(shapes))
    ports = tuple(OutputPort(f"y{number}") for number in range(outputs))
    entry = EntryPoint("run", frozenset({OTHER}), lambda module, *given: module(*given), inputs, ports)
    return Model(module.eval(), (entry,), Metadata(max_context=16, model_max_context=16, vocab_size=2))


def cost_of(
    function: Callable[..., Tensor] | nn.Module,
    *shapes: tuple[int | DynamicDim, ...],
    dtype: str = "float32",
    **sizes: int,
) -> MethodCost:
    module = function if isinstance(function, nn.Module) else Function(function)
    return method_cost(capture(model_of(module, *shapes, dtype=dtype)), "run", sizes)


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


# ---------------------------------------------------------------------------------------------------- FLOPs


def counted(run: Callable[[], object]) -> int:
    """FLOPs of a run on real tensors; the attention kernel made of matrix products is the one torch counts on a CPU."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


class Mixture(nn.Module):
    """Convolution, grouped-query attention, batched matrix product, einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, stride=2)
        self.query = nn.Linear(8, 16)
        self.pool = nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        query = self.query(x).unflatten(-1, (4, 4)).transpose(1, 2)
        key = x.unflatten(-1, (2, 4)).transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        scores = torch.einsum("bhsd,bhtd->bst", attended, attended)
        return scores @ x + torch.baddbmm(x, scores, x) + self.pool(x.transpose(1, 2)).sum()


@pytest.mark.parametrize("height", [4, 8])
def test_flops_are_what_torch_counts_on_the_eager_module(height: int) -> None:
    module = Mixture().eval()
    expected = counted(lambda: module(torch.randn(1, 3, height, 4)))
    assert expected > 1000
    assert cost_of(module, (1, 3, height, 4)).flops == expected


@pytest.mark.parametrize("passes", ["", "static-kv-cache", "static-kv-cache,swap-sdpa"])
@pytest.mark.parametrize("length", [5, 17])
def test_flops_of_a_language_model_are_what_torch_counts_at_that_length(passes: str, length: int) -> None:
    source = Source(tiny.tiny(layers=1))
    source = source.transform(passes) if passes else source
    program, model = source.capture().program, source.model
    prefill, decode = model.entry_points_with("prefill", "decode")
    start = torch.zeros(1, dtype=torch.int64)
    embeds, token = torch.randn(1, length, tiny.WIDTH), torch.zeros(1, 1, dtype=torch.int64)
    costs = program_cost(program, {"S": length})
    assert costs["prefill"].flops == counted(lambda: bound_forward(model.module, prefill)(embeds, start)) > 0
    assert costs["decode"].flops == counted(lambda: bound_forward(model.module, decode)(token, start)) > 0
    assert costs["token_embedding"].flops == 0


@pytest.mark.parametrize("passes", ["legalize-aten", "legalize-executorch"])
def test_legalization_changes_no_flops(passes: str) -> None:
    neutral = tiny.captured(tiny.tiny(layers=1))
    legal = neutral.rewrite(passes)
    for sizes in ({}, {"S": 3}):
        before, after = program_cost(neutral.program, sizes), program_cost(legal.program, sizes)
        assert {name: cost.flops for name, cost in before.items()} == {name: cost.flops for name, cost in after.items()}


def test_slicing_before_the_projection_saves_its_flops() -> None:
    captured = tiny.captured(tiny.tiny(layers=1))
    sliced = captured.rewrite("last-token-logits").program
    saved = cost_delta(program_cost(captured.program, {"S": 11}), program_cost(sliced, {"S": 11}))
    assert saved["prefill"].flops == -10 * 2 * tiny.WIDTH * tiny.VOCABULARY
    assert saved["decode"].flops == 0


class Conditional(nn.Module):
    """One product on one side, two on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.one, lambda x: self.three(self.two(x)), (x,))


def test_a_condition_costs_its_larger_branch() -> None:
    cost = cost_of(Conditional(), (S, 4), S=5)
    assert cost.flops == 2 * (2 * 5 * 4 * 8)
    # The sum reads x and writes 4 bytes, the comparison reads them and writes one; then the larger branch.
    branch_read = (5 * 4 + 4 * 8 + 8) * 4 + (5 * 8 + 8 * 4 + 4) * 4
    assert cost.bytes_read == 5 * 4 * 4 + 4 + branch_read
    assert cost.bytes_written == 4 + 1 + (5 * 8 + 5 * 4) * 4
    # x, the condition, and both results of the larger branch.
    assert cost.peak_live_bytes == 5 * 4 * 4 + 1 + (5 * 8 + 5 * 4) * 4


def test_a_region_with_its_own_gradient_mode_costs_what_is_in_it() -> None:
    def run(x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x @ x
        return y + 1

    cost = cost_of(run, (4, 4))
    assert (cost.flops, cost.bytes_read, cost.bytes_written) == (2 * 4**3, 64 + 64, 64 + 64)


# ---------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        (lambda x: x + 1, 96, 96),
        (lambda x: x * x, 96, 96),
        (lambda x: x + x.sum(), 96 + 96 + 4, 96 + 4),
        (lambda x: torch.cat([x, x + 1]), 96 + 192, 96 + 192),
        (lambda x: x.transpose(0, 1)[1:] + 1, 72, 72),  # a view of [3, 6] is read, nothing else
        (lambda x: x.transpose(0, 1).reshape(-1) + 1, 96 + 96, 96 + 96),  # this reshape copies
        (lambda x: x.reshape(-1) + 1, 96, 96),
        (lambda x: x.to(torch.float16), 96, 48),
        (lambda x: x.to(torch.float32) + 1, 96, 96),
        (lambda x: F.dropout(x, 0.5, training=False) + 1, 96, 96),
        (lambda x: x.unsqueeze(0).expand(10, 6, 4) + 1, 96, 960),  # every element is read once
        (lambda x: torch.topk(x, 2)[0] + 1, 96 + 48, 48 + 96 + 48),  # values and int64 indices are written
        (lambda x: torch.chunk(x, 2)[0] + 1, 48, 48),
        (lambda x: torch.zeros(2) + x[0, :2], 8 + 8, 8 + 8),
        (lambda x: torch.zeros(x.shape[0]), 0, 24),
        (lambda x: x.clone().add_(1), 96 + 96, 96 + 96),
        (lambda x: x.clone().zero_(), 96, 96 + 96),
        (lambda x: x.clone().copy_(x[0]), 96 + 16, 96 + 96),
    ],
)
def test_bytes_moved_by_operators(function: Callable[[Tensor], Tensor], read: int, written: int) -> None:
    cost = cost_of(function, (6, 4))
    assert (cost.bytes_read, cost.bytes_written) == (read, written)
    assert cost.bytes == read + written


def test_bytes_follow_the_size() -> None:
    assert cost_of(lambda x: x + 1, (S, 4), S=3).bytes_written == 3 * 4 * 4
    assert cost_of(lambda x: x + 1, (S, 4)).bytes_written == 16 * 4 * 4
    assert cost_of(lambda x: torch.cat([x, x]).flatten() + 1, (S, 4), S=3).bytes_written == 2 * (2 * 3 * 4 * 4)


def test_a_lookup_reads_the_rows_it_returns_and_the_indices() -> None:
    cost = cost_of(nn.Embedding(1000, 8), (S,), dtype="int64", S=3)
    assert (cost.bytes_read, cost.bytes_written) == (3 * 8 + 3 * 8 * 4, 3 * 8 * 4)
    assert cost.constant_bytes == 1000 * 8 * 4


class Rows(nn.Module):
    """Writes rows into a buffer and reads all of it."""

    rows: Tensor

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(1, 16, 2, 4))
        self.weight = nn.Parameter(torch.ones(4))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        slots = torch.arange(x.shape[1])
        self.write(self.rows, x, slots)
        return (self.rows * self.weight).sum()


@pytest.mark.parametrize(
    ("write", "index_bytes"),
    [
        (lambda rows, x, slots: torch.ops.triptych.update_cache(rows, x, slots[:1]), 8),
        (lambda rows, x, slots: rows.index_copy_(1, slots, x), 10 * 8),
        (lambda rows, x, slots: operator.setitem(rows, (slice(None), slots), x), 10 * 8),
    ],
)
def test_a_row_write_moves_the_rows_and_reading_the_buffer_moves_all_of_it(
    write: Callable[..., object], index_bytes: int
) -> None:
    program = capture(model_of(Rows(write), (1, S, 2, 4)))
    assert list(program.state) == ["rows"]
    cost = method_cost(program, "run", {"S": 10})
    row = 2 * 4 * 4
    # The write; the product of the buffer and the weight; its sum.
    assert cost.bytes_read == (10 * row + index_bytes) + (16 * row + 16) + 16 * row
    assert cost.bytes_written == 10 * 8 + 10 * row + 16 * row + 4
    assert cost.constant_bytes == 16, "the buffer is state"


def test_cached_attention_reads_the_whole_cache_whatever_the_length() -> None:
    def attend(query: Tensor, cache: Tensor) -> Tensor:
        return torch.ops.triptych.cached_sdpa(query, cache, cache + 0, torch.zeros(1, dtype=torch.int64))

    cost = cost_of(attend, (1, S, 2, 4), (1, 16, 2, 4), S=3)
    query, cache, start = 3 * 2 * 4 * 4, 16 * 2 * 4 * 4, 8
    assert cost.bytes_read == cache + query + 2 * cache + start
    assert cost.bytes_written == start + cache + query
    assert cost.flops == 2 * (2 * 2 * 3 * 16 * 4)


def test_tied_weights_are_one_constant_and_state_is_none(tiny_program: Program) -> None:
    block = 4 * (3 * 32 * 32 + 32 * 32 + 2 * 64 * 32 + 2 * 32)
    expected = 2 * block + 4 * (2 * 32 + tiny.CONTEXT_LENGTH * 32 + tiny.VOCABULARY * 32)
    costs = program_cost(tiny_program)
    assert costs["decode"].constant_bytes == costs["prefill"].constant_bytes == expected
    assert costs["token_embedding"].constant_bytes == tiny.VOCABULARY * 32 * 4


def test_quantized_weights_are_read_as_they_are_stored() -> None:
    model = tiny.tiny(layers=1, width=64)
    whole = tiny.captured(model)
    quantized = tiny.captured(model, f"quantize{{recipe=8da4w}},{tiny.DEFAULT_PASSES}")
    embedding = method_cost(quantized.program, "token_embedding", {"S": 4})
    stored = tiny.VOCABULARY * (64 + 4 + 1)  # int8 values, a float scale and an int8 zero point for each row
    assert embedding.constant_bytes == stored
    assert embedding.bytes_read == 4 * 8 + 4 * stored // tiny.VOCABULARY
    assert embedding.bytes_written == 4 * 64 * 4
    decode, unquantized = (method_cost(one.program, "decode") for one in (quantized, whole))
    assert decode.flops == unquantized.flops
    assert decode.bytes_read < unquantized.bytes_read / 2
    spelled_out = method_cost(quantized.rewrite("legalize-aten").program, "decode")
    assert spelled_out.bytes_read > unquantized.bytes_read


# ---------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("function", "peak"),
    [
        (lambda x: x + 1, 2 * 96),
        (lambda x: ((x + 1) * 2).relu(), 2 * 96),  # a chain: one operator's input and output at a time
        (lambda x: (x + 1) * x, 3 * 96),  # x lives to its last use
        (lambda x: (x + 1) * (x + 2), 3 * 96),
        (lambda x: (x + 1).t()[1:].sum() + 1, 2 * 96),  # the views add nothing and keep the sum's 96 bytes
        (lambda x: torch.cat([x, x]), 96 + 192),
        (lambda x: x.clone().add_(1).mul_(2), 2 * 96),
        (lambda x: x[:1] + 1, 96 + 16),
        (lambda x: torch.topk(x, 2)[1] + 0, 96 + 48 + 96),  # then 48 + 96 + 96 is as much
    ],
)
def test_peak_memory(function: Callable[[Tensor], Tensor], peak: int) -> None:
    assert cost_of(function, (6, 4)).peak_live_bytes == peak


def test_a_view_keeps_its_base_alive() -> None:
    def run(x: Tensor) -> Tensor:
        view = torch.cat([x, x])[:1]
        y = x + 1
        return view + y

    # At the last addition the concatenation, y and the result live; x does not.
    assert cost_of(run, (1, 4)).peak_live_bytes == 32 + 16 + 16


def test_weights_and_state_are_no_live_memory() -> None:
    cost = method_cost(
        capture(model_of(Rows(lambda rows, x, slots: rows.index_copy_(1, slots, x)), (1, 2, 2, 4))), "run"
    )
    # The product of buffer and weight, and its sum.
    assert cost.peak_live_bytes == 16 * 2 * 4 * 4 + 4


# ---------------------------------------------------------------------------------------------------- sizes


def test_sizes_default_to_the_maximum(tiny_program: Program) -> None:
    assert program_cost(tiny_program) == program_cost(tiny_program, {"S": tiny.CONTEXT_LENGTH})
    assert method_cost(tiny_program, "prefill").flops > method_cost(tiny_program, "prefill", {"S": 1}).flops


def test_a_size_means_the_methods_that_have_it(tiny_program: Program) -> None:
    assert program_cost(tiny_program, {"S": 3})["decode"] == method_cost(tiny_program, "decode")
    assert program_cost(tiny_program, {"S": 3})["prefill"] == method_cost(tiny_program, "prefill", {"S": 3})


def test_what_only_a_run_decides_stands_at_its_upper_bound() -> None:
    cost = cost_of(lambda x: (torch.nonzero(x) + 1).sum(), (S,), dtype="int64", S=7)
    assert cost.bytes_written == 2 * (S.maximum * 8) + 8


def test_a_size_without_a_bound_is_an_error_that_says_what_to_do() -> None:
    def run(x: Tensor) -> Tensor:
        length = x.max().item()
        torch._check(length >= 0)
        return torch.zeros(length).sum()  # type: ignore[call-overload]

    with pytest.raises(UsageError, match=r"a run decides the size u\d+ and nothing bounds it.*torch\._check"):
        cost_of(run, (4,), dtype="int64")


@pytest.mark.parametrize(
    ("method", "sizes", "message"),
    [
        ("encode", {}, "no method 'encode'; its methods: token_embedding, prefill, decode"),
        ("prefill", {"T": 3}, r"no dynamic dimension of prefill is called 'T'; known: S \(1 to 24\)"),
        ("decode", {"S": 3}, "no dynamic dimension of decode is called 'S'; known: none"),
        ("prefill", {"S": 25}, "S is 25; prefill takes 1 to 24"),
        ("prefill", {"S": 0}, "S is 0; prefill takes 1 to 24"),
    ],
)
def test_a_wrong_method_or_size_is_named(
    tiny_program: Program, method: str, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        method_cost(tiny_program, method, sizes)


def test_a_program_names_all_its_dimensions(tiny_program: Program) -> None:
    with pytest.raises(UsageError, match=r"of token_embedding, prefill, decode is called 'T'; known: S \(1 to 24\)"):
        program_cost(tiny_program, {"S": 2, "T": 3})


def test_differences_cover_methods_of_both_sides() -> None:
    before = {"kept": MethodCost(5, 1, 2, 3, 4), "dropped": MethodCost(flops=7)}
    after = {"kept": MethodCost(9, 1, 1, 3, 8), "added": MethodCost(bytes_read=2)}
    assert cost_delta(before, after) == {
        "kept": MethodCost(4, 0, -1, 0, 4),
        "dropped": MethodCost(flops=-7),
        "added": MethodCost(bytes_read=2),
    }
