"""Cross-attention with kept keys and values: new, kept and replaced encoder inputs, on every engine."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.modules.engines import captured_calls, run_everywhere
from triptych.compiler.targets.pte import read_pte
from triptych.modules.cross_attention import (
    CrossAttention,
    CrossAttentionCache,
    EncoderInputState,
    current_presence,
    encoder_input,
)

WIDTH, HEADS, LENGTH = 32, 4, 6
YES, NO = torch.tensor([True]), torch.tensor([False])
GARBAGE = torch.full((1, LENGTH, WIDTH), torch.nan)
LINEAR_KERNELS = ("linear", "addmm", "mm.", "bmm")


class Layer(nn.Module):
    """Cross-attention between four projections; those of keys and values stand before the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        head = WIDTH // HEADS
        self.attention = CrossAttention(CrossAttentionCache(LENGTH, HEADS, head, head, torch.float32))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor, states: Tensor, present: Tensor) -> Tensor:
        query, key, value = self.split(self.query(x)), self.split(self.key(states)), self.split(self.value(states))
        attended = self.attention(query, key, value, present=present)
        return self.out(attended.transpose(1, 2).flatten(2))

    def plain(self, x: Tensor, states: Tensor) -> Tensor:
        """What it means: ordinary attention to one encoder input."""
        query, key, value = self.split(self.query(x)), self.split(self.key(states)), self.split(self.value(states))
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


@pytest.fixture
def layer() -> Layer:
    return Layer().eval().requires_grad_(requires_grad=False)


@pytest.fixture
def calls() -> list[tuple[Tensor, Tensor, Tensor]]:
    """New, kept twice with garbage in the place of the encoder input, replaced, kept."""
    first, second = torch.randn(2, 1, LENGTH, WIDTH)
    steps = [(first, YES), (GARBAGE, NO), (GARBAGE, NO), (second, YES), (GARBAGE, NO)]
    return [(torch.randn(1, 3 if index == 0 else 1, WIDTH), *step) for index, step in enumerate(steps)]


def wanted(layer: Layer, calls: list[tuple[Tensor, Tensor, Tensor]]) -> list[Tensor]:
    given = [calls[0][1]] * 3 + [calls[3][1]] * 2
    return [layer.plain(x, states) for (x, _, _), states in zip(calls, given, strict=True)]


def test_a_call_without_encoder_input_attends_to_the_last_one(
    layer: Layer, calls: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    for call, expected in zip(calls, wanted(layer, calls), strict=True):
        torch.testing.assert_close(layer(*call), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_it_exports(layer: Layer, calls: list[tuple[Tensor, Tensor, Tensor]], strict: bool) -> None:
    length = torch.export.Dim("S", min=1, max=8)
    exported = torch.export.export(layer, calls[0], dynamic_shapes=({1: length}, None, None), strict=strict)
    assert sum(node.target is torch.ops.higher_order.cond for node in exported.graph.nodes) == 1
    module = exported.module()
    for call, expected in zip(calls, wanted(layer, calls), strict=True):
        torch.testing.assert_close(module(*call), expected)


def test_the_pte_holds_every_linear_layer_in_a_delegate_and_computes_the_same(
    layer: Layer, calls: list[tuple[Tensor, Tensor, Tensor]], tmp_path: Path
) -> None:
    outputs = run_everywhere(layer, calls, engines=("export", "executorch"))
    for (output,), expected in zip(outputs, wanted(layer, calls), strict=True):
        torch.testing.assert_close(output, expected)
    captured_calls(layer, calls).lower("xnnpack").save(tmp_path / "artifact")
    (method,) = (one for one in read_pte(tmp_path / "artifact" / "model.pte").methods.values() if one.operators)
    assert method.delegates["XnnpackBackend"] >= 1
    assert not [operator for operator in method.operators if any(kernel in operator for kernel in LINEAR_KERNELS)]


@pytest.mark.slow
def test_aotinductor_computes_the_same(layer: Layer, calls: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    run_everywhere(layer, calls, engines=("aotinductor",))


@pytest.mark.parametrize("present", [True, False])
def test_where_it_is_known_beforehand_no_branch_is_exported(layer: Layer, present: bool) -> None:
    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, states: Tensor) -> Tensor:
            return self.layer(x, states, present)  # type: ignore[no-any-return]

    exported = torch.export.export(Known(), (torch.randn(1, 2, WIDTH), torch.randn(1, LENGTH, WIDTH)))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert "cond" not in targets
    assert ("aten.copy_.default" in targets) is present


def test_a_masked_call_is_masked(layer: Layer) -> None:
    query, key, value = (torch.randn(1, HEADS, size, WIDTH // HEADS) for size in (2, LENGTH, LENGTH))
    mask = torch.ones(1, 1, 2, LENGTH, dtype=torch.bool)
    mask[..., 0, :4] = False
    with encoder_input(present=True):
        got = layer.attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
    assert not torch.allclose(got[:, :, 0], F.scaled_dot_product_attention(query, key, value)[:, :, 0])


@pytest.mark.parametrize("options", [{"is_causal": True}, {"dropout_p": 0.1}])
def test_causal_and_dropping_calls_are_refused(layer: Layer, options: dict[str, float]) -> None:
    rows = torch.randn(1, HEADS, LENGTH, WIDTH // HEADS)
    with encoder_input(present=True), pytest.raises(ValueError, match="not causal and have no dropout"):
        layer.attention(rows, rows, rows, **options)


def test_a_call_that_announces_nothing_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="outside of 'encoder_input'; announce"):
        current_presence()


def test_what_does_not_attend_keeps_the_rows_all_the_same(layer: Layer) -> None:
    query, key, value = (torch.randn(1, HEADS, size, WIDTH // HEADS) for size in (2, LENGTH, LENGTH))
    with encoder_input(present=True, attends=False):
        assert not layer.attention(query, key, value).any()
    with encoder_input(present=False):
        got = layer.attention(query, torch.full_like(key, torch.nan), torch.full_like(value, torch.nan))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value))


def test_an_announcement_ends_with_its_block() -> None:
    with encoder_input(present=True):
        with encoder_input(present=False):
            assert current_presence() is False
        assert current_presence() is True
    with pytest.raises(RuntimeError):
        current_presence()


def test_seen_stays_true_once_any_call_brought_an_encoder_input() -> None:
    state = EncoderInputState()
    seen = [bool(state(present)) for present in (NO, False, YES, NO, False)]
    assert seen == [False, False, True, True, True]
    assert bool(EncoderInputState()(True))
