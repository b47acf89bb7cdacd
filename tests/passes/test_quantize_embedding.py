"""`quantize-embedding` stores token tables in 8 or 4 bits, once for all methods, and not beside their float form."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from tests.passes.graphs import operators
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES
from triptych.compiler.pipeline import parse
from triptych.compiler.program import Program
from triptych.compiler.stages import Captured
from triptych.errors import PipelineError, VerificationError
from triptych.passes import quantize_embedding
from triptych.passes.quantize_embedding import QuantizeEmbedding
from triptych.testing import check_pass, default_model

LOOKUP = "triptych.quantized_embedding.default"
POSITIONS = "its indices are not the tokens of an input"


def untied(width: int = tiny.WIDTH) -> Model:
    return tiny.tiny(tied=False, layers=1, width=width)


def captured(model: Model) -> Captured:
    return tiny.captured(model)


def nbytes(program: Any) -> int:
    assert isinstance(program, Program)
    return sum(weight.nbytes for weight in program.weights.values())


def rows(program: Any) -> Tensor:
    """Return the embeddings of all tokens."""
    assert isinstance(program, Program)
    found: Tensor = program.methods["token_embedding"].exported.module()(torch.arange(24).unsqueeze(0))[0]
    return found


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({"bits": 8}, tiny.VOCABULARY * (tiny.WIDTH + 4)),
        ({"bits": 8, "group": 8}, tiny.VOCABULARY * (tiny.WIDTH + 4 * 4)),
        ({"bits": 4}, tiny.VOCABULARY * (tiny.WIDTH // 2 + 4)),
        ({"bits": 4, "group": 16}, tiny.VOCABULARY * (tiny.WIDTH // 2 + 2 * 4)),
    ],
    ids=str,
)
def test_all_methods_share_the_quantized_table(options: dict[str, Any], stored: int) -> None:
    one = QuantizeEmbedding(**options)
    check = check_pass(one, untied(), matches=1, refuses={"prefill: embedding": POSITIONS})
    assert nbytes(check.after) - nbytes(check.before) == stored - 4 * tiny.VOCABULARY * tiny.WIDTH
    assert isinstance(check.after, Program)
    for method in ("token_embedding", "decode"):
        assert operators(check.after.methods[method].exported)[LOOKUP] == 1
    assert check.after.weights["embedding.weight_quantized"].users == ("decode", "token_embedding")
    assert max(report.comparison.worst_relative for report in check.traces) > DEFAULT_TOLERANCES["float32"].relative


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("group", [None, 16])
def test_no_element_is_off_by_more_than_half_a_step(bits: Any, steps: int, group: int | None) -> None:
    model = untied()
    program = captured(model).rewrite(QuantizeEmbedding(bits=bits, group=group)).program
    table = model.module.get_parameter("embedding.weight").detach()[:24]
    largest = table.unflatten(1, (-1, group or tiny.WIDTH)).abs().amax(-1, keepdim=True)
    error = (rows(program) - table).unflatten(1, (-1, group or tiny.WIDTH)).abs()
    assert bool((error <= largest / steps * 0.5001).all())
    assert float(error.max()) > 0


def test_extreme_rows_are_kept() -> None:
    model = untied()
    table = model.module.get_parameter("embedding.weight")
    with torch.no_grad():
        table[0] = 0
        table[1] = -torch.arange(tiny.WIDTH).float()
        table[2] = 1e-30
    program = captured(model).rewrite(QuantizeEmbedding()).program
    found = rows(program)
    torch.testing.assert_close(found[:3], table.detach()[:3], rtol=0.01, atol=0.13)
    assert torch.equal(found[0], table.detach()[0])
    assert float(found[1].min()) == -(tiny.WIDTH - 1)


def test_a_half_precision_table_gives_half_precision_rows() -> None:
    class Half(nn.Module):
        """Rounds the table, which it gets, to bfloat16."""

        def __init__(self, table: nn.Embedding) -> None:
            super().__init__()
            self.weight = nn.Parameter(table.weight.detach().to(torch.bfloat16))

        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.embedding(tokens, self.weight).float()

    model = untied()
    model.module.embedding = Half(model.module.get_submodule("embedding"))  # type: ignore[arg-type]
    program = captured(model).rewrite(QuantizeEmbedding()).program
    found = operators(program.methods["decode"].exported)
    assert found[LOOKUP] == 1
    assert found["aten.to.dtype"] == 2


def test_a_tied_table_is_refused_with_the_bytes_it_would_cost() -> None:
    added = 435 * (128 + 4)
    with pytest.raises(
        PipelineError, match=rf"prefill: aten\.linear.*uses it too.* {added} bytes be added; untie=true"
    ):
        check_pass(QuantizeEmbedding(), default_model(), matches=1)


def test_untying_is_an_option() -> None:
    check = check_pass(QuantizeEmbedding(untie=True), default_model(), matches=1)
    assert nbytes(check.after) - nbytes(check.before) == 435 * (128 + 4)


def test_a_model_that_four_bits_change_too_much_is_seen() -> None:
    with pytest.raises(VerificationError, match="quantize-embedding the model computes something else"):
        check_pass(QuantizeEmbedding(bits=4, untie=True), default_model(), matches=1)


def test_halves_of_a_byte_in_the_wrong_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    data = quantize_embedding._data

    def wrong(bits: int, group: int, table: Tensor) -> Tensor:
        packed = data(bits, group, table)
        return packed % 16 * 16 + packed // 16

    monkeypatch.setattr(quantize_embedding, "_data", wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(QuantizeEmbedding(bits=4), untied(), matches=1)


def test_groups_that_do_not_divide_a_row_are_refused() -> None:
    with pytest.raises(
        PipelineError, match=r"embedding\.weight: its rows have 32 elements, .* no multiple of group=12"
    ):
        captured(untied()).rewrite("quantize-embedding{group=12}")


def test_rows_of_odd_length_are_refused_in_four_bits() -> None:
    class Odd(nn.Module):
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(tiny.VOCABULARY, 33))
            self.head = head

        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.embedding(tokens, self.table)[..., : tiny.WIDTH]

    model = untied()
    model.module.embedding = Odd(model.module.get_submodule("embedding"))  # type: ignore[assignment]
    with pytest.raises(PipelineError, match="its rows have 33 elements, and 4 bits need an even number"):
        captured(model).rewrite("quantize-embedding{bits=4}")


def test_a_quantized_table_is_refused() -> None:
    quantized = tiny.captured(untied(), "quantize{recipe=8da4w},static-kv-cache,swap-sdpa")
    with pytest.raises(PipelineError, match=r"its table is torchao\.dequantize_affine.*, no parameter"):
        quantized.rewrite(QuantizeEmbedding())


def test_it_is_text_as_well() -> None:
    (one,) = parse("quantize-embedding{bits=4,group=16,untie=true}").passes
    assert one == QuantizeEmbedding(bits=4, group=16, untie=True)
    assert one.tolerances["float32"].relative > QuantizeEmbedding().tolerances["float32"].relative
