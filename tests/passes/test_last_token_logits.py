"""`last-token-logits` projects one row to the vocabulary, and that row is the last one of all rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from tests.compiler import tiny
from triptych.compiler.model import OutputPort
from triptych.compiler.program import Program
from triptych.compiler.stages import Captured
from triptych.errors import PipelineError

QUANTIZED = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa"


def calls(program: Program, target: str, method: str = "prefill") -> list[Node]:
    nodes = program.methods[method].exported.graph.nodes
    return [node for node in nodes if node.op == "call_function" and str(node.target) == target]


def with_logits(change: Callable[[Tensor], Tensor]) -> Captured:
    """Return a stateless tiny model whose prefill changes its logits in this way."""
    model = tiny.with_entry_point(
        tiny.tiny(layers=1),
        "prefill",
        forward=lambda module, embeds, start_pos: change(tiny.prefill(module, embeds, start_pos)),
    )
    return tiny.captured(model, "")


def prefilled(program: Program, length: int = 6) -> Tensor:
    embeds = torch.randn(1, length, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = program.methods["prefill"].exported.module()(embeds, torch.tensor([0]))
    return logits


def test_the_output_is_one_row() -> None:
    captured = tiny.captured(tiny.tiny(layers=1))
    assert len(captured.program.methods["prefill"].outputs[0].shape) == 3
    program = captured.rewrite("last-token-logits").program
    assert [program.methods[name].outputs[0].shape for name in ("prefill", "decode")] == [(1, tiny.VOCABULARY)] * 2


def test_it_changes_prefill_and_decode_and_no_other_method() -> None:
    captured = tiny.captured(tiny.tiny(layers=1))
    rewritten = captured.rewrite("last-token-logits")
    assert [match.method for match in rewritten.results[-1].matches] == ["prefill", "decode"]
    assert rewritten.program.methods["token_embedding"] is captured.program.methods["token_embedding"]


@pytest.mark.parametrize("passes", [tiny.DEFAULT_PASSES, QUANTIZED], ids=["fp32", "8da4w"])
def test_the_projection_sees_one_row(passes: str) -> None:
    program = tiny.captured(passes=passes).rewrite("last-token-logits").program
    *layers, projection = calls(program, "aten.linear.default")
    assert tuple(projection.meta["val"].shape) == (1, 1, tiny.VOCABULARY)
    assert tuple(projection.args[0].meta["val"].shape) == (1, 1, tiny.WIDTH)  # type: ignore[union-attr]
    assert len(layers) == 2 * 4
    assert not [one for one in layers if isinstance(one.meta["val"].shape[1], int)], "the layers see every position"


def test_the_quantization_of_the_projections_input_sees_one_row_too() -> None:
    program = tiny.captured(passes=QUANTIZED).rewrite("last-token-logits").program
    chosen = calls(program, "torchao.choose_qparams_affine.default")
    assert len(chosen) == 2 * 4 + 1
    assert tuple(chosen[-1].args[0].meta["val"].shape) == (1, 1, tiny.WIDTH)  # type: ignore[union-attr]


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda logits: logits,
    "capped": lambda logits: 3 * torch.tanh(logits / 3),
    "normalized over the vocabulary": lambda logits: logits / logits.pow(2).mean(-1, keepdim=True).sqrt(),
    "softmax over the vocabulary": lambda logits: logits.softmax(-1),
    "centred over positions": lambda logits: logits - logits.mean(dim=1, keepdim=True),
    "summed over positions": lambda logits: logits.cumsum(dim=1),
    "softmax over positions": lambda logits: logits.softmax(1),
    "shifted": lambda logits: logits.roll(1, dims=1),
    "weighted by position": lambda logits: logits * torch.arange(1, logits.shape[1] + 1).unsqueeze(1),
    "weighted by position, with a batch": lambda logits: (
        logits * torch.arange(1, logits.shape[1] + 1).reshape(1, -1, 1)
    ),
    "added to its own mean": lambda logits: logits + logits.amax(dim=(1, 2), keepdim=True),
    "changed in place": lambda logits: logits.clone().mul_(2).add_(1),
    "in another dtype and back": lambda logits: logits.double().mul(2).float(),
}


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT.keys())
def test_the_row_is_the_last_of_all_rows(change: Callable[[Tensor], Tensor]) -> None:
    captured = with_logits(change)
    wanted = prefilled(captured.program)[:, -1]
    got = prefilled(captured.rewrite("last-token-logits").program)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 24])
def test_every_length_still_works(length: int) -> None:
    captured = with_logits(lambda logits: logits)
    got = prefilled(captured.rewrite("last-token-logits").program, length)
    torch.testing.assert_close(got, prefilled(captured.program, length)[:, -1], rtol=1e-5, atol=1e-5)


def test_a_second_output_keeps_all_rows() -> None:
    model = tiny.with_entry_point(
        tiny.tiny(layers=1),
        "prefill",
        forward=lambda module, embeds, start_pos: (logits := tiny.prefill(module, embeds, start_pos), logits * 2),
        outputs=(OutputPort("logits", ("sampler",)), OutputPort("scores")),
    )
    captured = tiny.captured(model, "")
    program = captured.rewrite("last-token-logits").program
    embeds = torch.randn(1, 6, tiny.WIDTH)
    with torch.no_grad():
        logits, scores = program.methods["prefill"].exported.module()(embeds, torch.tensor([0]))
        whole, _ = captured.program.methods["prefill"].exported.module()(embeds, torch.tensor([0]))
    torch.testing.assert_close(logits, whole[:, -1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores, 2 * whole, rtol=1e-5, atol=1e-5)


def test_logits_of_one_row_already_are_refused() -> None:
    model = tiny.tiny(layers=1)
    for name, forward in (("prefill", tiny.prefill), ("decode", tiny.decode)):
        model = tiny.with_entry_point(
            model, name, forward=lambda module, x, start_pos, forward=forward: forward(module, x, start_pos)[:, -1]
        )
    with pytest.raises(PipelineError, match="logits: has 2 dimensions; 3 are sliced"):
        tiny.captured(model, "").rewrite("last-token-logits")
