"""`precompute-rope` looks up sines and cosines of the position, bit by bit what the model computes."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler import tiny
from triptych.compiler.cost import program_cost
from triptych.compiler.model import Model
from triptych.compiler.positions import PositionFunctions
from triptych.compiler.program import Program
from triptych.errors import VerificationError
from triptych.manifest import TensorSignature
from triptych.passes.precompute_rope import PrecomputeRoPE
from triptych.testing import check_pass, default_model

HEAD = tiny.WIDTH // tiny.HEADS
Tables = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def frequencies(factor: float = 1.0) -> Tensor:
    return 1.0 / (100.0 * factor) ** (torch.arange(0, HEAD, 2).float() / HEAD)


def both(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Angles [.., D / 2] → cosines and sines [.., D]."""
    full = torch.cat((angles, angles), dim=-1)
    return full.cos(), full.sin()


def plain(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return both(positions.unsqueeze(-1).float() * inverse)


def product(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """As a matrix product, transposed, scaled and cast, as transformers has had it."""
    angles = (inverse[None, :, None].float() @ positions[None, None, :].float()).transpose(1, 2)
    cos, sin = both(angles)
    return (cos * 1.1).to(torch.float64).to(torch.float32)[0], (sin * 1.1)[0]


def outer(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return both(torch.outer(positions.float() / 4, inverse))


def computed_frequencies(positions: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """The frequencies are computed in every call too."""
    return both(positions.view(-1, 1) * (1.0 / 50.0 ** (torch.arange(0, HEAD, 2).float() / HEAD)))


def three_rows(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Multimodal tables of text: three equal rows, taken apart by sections."""
    cos, sin = plain(positions.unsqueeze(0).expand(3, -1), inverse)
    parts = [[table[index][:, index * 4 : index * 4 + 4] for index in range(3)] for table in (cos, sin)]
    rest = [table[0][:, 12:] for table in (cos, sin)]
    return torch.cat((*parts[0], rest[0]), -1), torch.cat((*parts[1], rest[1]), -1)


def one_from_the_other(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = plain(positions, inverse)
    return cos, sin + 0.25 * cos


RIGHT: dict[str, Tables] = {
    "plain": plain,
    "product": product,
    "outer": outer,
    "computed frequencies": computed_frequencies,
    "three rows": three_rows,
    "one from the other": one_from_the_other,
}


def by_length(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies that follow the length of the input."""
    return plain(positions, inverse * (1 + positions.shape[0] / 100))


def by_largest(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies that follow the largest position."""
    return plain(positions, inverse * torch.where(positions.amax() > 9, 0.5, 1.0))


def by_first(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return plain(positions - positions[:1], inverse)


def summed(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return plain(positions.cumsum(0), inverse)


def from_zero(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows numbered from zero in every call."""
    return plain(torch.arange(positions.shape[0]), inverse)


REFUSED: dict[str, tuple[Tables, str]] = {
    "length": (by_length, r"prefill: cos.*: it mixes positions in aten\.mul\.Tensor"),
    "largest position": (by_largest, r"prefill: cos.*: it mixes positions in aten\.amax\.default"),
    "first position": (by_first, r"prefill: cos.*: it mixes positions in aten\.slice\.Tensor"),
    "sum of positions": (summed, r"prefill: cos.*: it mixes positions in aten\.cumsum\.default"),
    "numbers from zero": (from_zero, r"prefill: cos.*: it depends on the length of the input, not on the position"),
}


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


class Rotary(tiny.TinyAttention):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # type: ignore[override]
        query, key, value = self.split(x)
        query, key = turn(query, cos, sin), turn(key, cos, sin)
        return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class RotaryModel(tiny.TinyModel):
    """Rotates queries and keys, by tables for all layers, or by each layer's own."""

    def __init__(self, tables: Tables, each: bool = False) -> None:
        super().__init__(*(tiny.TinyBlock(Rotary()) for _ in range(2)))
        self.tables = tables
        self.each = each
        self.register_buffer("inverse", frequencies())

    def logits(self, embeds: Tensor, positions: Tensor) -> Tensor:
        x = embeds
        once = self.tables(positions, self.inverse)
        for block in self.blocks:
            cos, sin = self.tables(positions, self.inverse.clone()) if self.each else once
            x = x + block.attention(block.norm(x), cos, sin)
            x = x + block.down(F.gelu(block.up(x)))
        return self.head(self.norm(x))


def model(tables: Tables = plain, each: bool = False) -> Model:
    torch.manual_seed(3)
    return tiny.describe(RotaryModel(tables, each).eval())


def sines(program: Program, method: str) -> int:
    nodes = program.methods[method].exported.graph.nodes
    return sum(node.target in (torch.ops.aten.sin.default, torch.ops.aten.cos.default) for node in nodes)


def lookups(program: Program, method: str) -> int:
    nodes = program.methods[method].exported.graph.nodes
    return sum(node.target is torch.ops.aten.index_select.default for node in nodes)


def two_tables(before: Any, after: Any) -> bool:
    """Two lookups in two tables that both methods share, in place of all sines, cosines and their arguments."""
    for method in ("prefill", "decode"):
        assert sines(before, method) >= 2
        assert sines(after, method) == 0
        assert lookups(after, method) == 2
        assert program_cost(after)[method].bytes < program_cost(before)[method].bytes
        graphs = [len(one.methods[method].exported.graph.nodes) for one in (before, after)]
        assert graphs[1] < graphs[0]
    tables = [row for row in after.weights.values() if "rotary_table" in row.key]
    assert [row.users for row in tables] == [("decode", "prefill")] * 2
    assert all(before.metadata.max_context in row.uses[0].tensor.shape for row in tables)
    assert not any("inverse" in row.key for row in after.weights.values()), "the frequencies are no longer needed"
    return True


@pytest.mark.parametrize("tables", RIGHT.values(), ids=RIGHT.keys())
def test_what_depends_on_the_position_is_looked_up(tables: Tables) -> None:
    check_pass(PrecomputeRoPE(), model(tables), matches={"prefill": 2, "decode": 2}, effect=two_tables)


@pytest.mark.parametrize("tables", RIGHT.values(), ids=RIGHT.keys())
def test_every_bit_is_what_the_model_computes(tables: Tables) -> None:
    """Logits of a stateless model, at several starts and lengths, up to the last position."""
    captured = tiny.captured(model(tables), "")
    rewritten = captured.rewrite("precompute-rope").program
    assert sines(rewritten, "prefill") == 0
    for start, length in ((0, 1), (0, 24), (3, 5), (7, 16), (23, 1)):
        embeds, position = torch.randn(1, length, tiny.WIDTH), torch.tensor([start])
        with torch.no_grad():
            wanted = captured.program.methods["prefill"].exported.module()(embeds, position)
            got = rewritten.methods["prefill"].exported.module()(embeds, position)
        assert torch.equal(got, wanted)


def test_layers_with_tables_of_their_own_share_one_lookup() -> None:
    matches = {"prefill": 4, "decode": 4}
    check_pass(PrecomputeRoPE(), model(each=True), matches=matches, effect=two_tables)


def test_a_fixed_length_of_several_positions() -> None:
    described = model()
    embeds = TensorSignature("embeds", "float32", (1, 5, tiny.WIDTH), ("token_embedding.embeds",))
    entries = [
        replace(entry, inputs=(embeds, *entry.inputs[1:])) if entry.name == "prefill" else entry
        for entry in described.entry_points
        if entry.name != "token_embedding"
    ]
    entries[0] = replace(entries[0], inputs=(replace(embeds, links=()), *entries[0].inputs[1:]))
    captured = tiny.captured(replace(described, entry_points=tuple(entries)), "")
    rewritten = captured.rewrite("precompute-rope").program
    assert two_tables(captured.program, rewritten)
    for start in (0, 4, 19):
        inputs = torch.randn(1, 5, tiny.WIDTH), torch.tensor([start])
        with torch.no_grad():
            wanted = captured.program.methods["prefill"].exported.module()(*inputs)
            assert torch.equal(rewritten.methods["prefill"].exported.module()(*inputs), wanted)


def test_the_default_model() -> None:
    matches = {"prefill": 2, "decode": 2}
    check_pass(PrecomputeRoPE(), default_model(), matches=matches, effect=two_tables)


def test_a_quantized_model() -> None:
    after = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture,last-token-logits"
    check_pass(PrecomputeRoPE(), model(), after=after, matches={"prefill": 2, "decode": 2}, effect=two_tables)


def test_tables_are_as_long_as_the_context() -> None:
    program = tiny.captured(model(), "static-kv-cache{max=10},swap-sdpa").rewrite("precompute-rope").program
    shapes = {tuple(row.uses[0].tensor.shape) for row in program.weights.values() if "rotary_table" in row.key}
    assert shapes == {(10, HEAD)}


def assert_refused(described: Model, reason: str) -> None:
    """Nothing is looked up, and `reason` is among those that the pass gives."""
    captured = tiny.captured(described, "")
    rewritten = captured.rewrite("precompute-rope")
    assert rewritten.program is captured.program
    assert re.search(reason, "; ".join(map(str, rewritten.results[-1].refusals)))


@pytest.mark.parametrize(("tables", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_depends_on_more_is_refused(tables: Tables, reason: str) -> None:
    described = model(tables)
    prefill_only = tuple(entry for entry in described.entry_points if entry.name == "prefill")
    stateless = replace(prefill_only[0].inputs[0], links=())
    entry = replace(prefill_only[0], inputs=(stateless, *prefill_only[0].inputs[1:]))
    assert_refused(replace(described, entry_points=(entry,)), reason)


def test_the_real_parts_of_complex_tables_are_looked_up() -> None:
    def turned(positions: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = plain(positions, inverse)
        return torch.view_as_real(torch.complex(cos, sin) * (cos * 1j))[..., 0], sin

    program = tiny.captured(model(turned), "").rewrite("precompute-rope").program
    tables = [row.dtype for row in program.weights.values() if "rotary_table" in row.key]
    assert tables == [torch.float32] * 2


def test_positions_that_the_caller_gives_are_refused() -> None:
    described = model()
    (entry,) = (entry for entry in described.entry_points if entry.name == "prefill")
    positions = TensorSignature("position_ids", "int64", (3, tiny.SEQUENCE), ())

    def forward(module: Any, embeds: Tensor, start_pos: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = module.logits(embeds, position_ids[1]) + start_pos
        return logits

    embeds = replace(entry.inputs[0], links=())
    changed = replace(entry, forward=forward, inputs=(embeds, entry.inputs[1], positions))
    assert_refused(replace(described, entry_points=(changed,)), r"cos: it depends on the input position_ids")


def test_the_oracle_sees_tables_that_begin_one_later(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PositionFunctions.table
    shifted = lambda self, node, positions: right(self, node, positions).roll(1, 0)  # noqa: E731
    monkeypatch.setattr(PositionFunctions, "table", shifted)
    with pytest.raises(VerificationError, match="after pass precompute-rope"):
        check_pass(PrecomputeRoPE(), model(), matches={"prefill": 2, "decode": 2})
