"""`deduplicate-weights` stores equal bytes once, and never merges what only looks equal."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler import storage
from triptych.compiler.editing import rebuild, storage_identity
from triptych.compiler.manager import run_program
from triptych.compiler.model import Model
from triptych.compiler.program import Program
from triptych.passes.deduplicate_weights import DeduplicateWeights
from triptych.testing import check_pass

PASS = DeduplicateWeights()
NORMS = 2 * 2 * tiny.WIDTH * 4
"""Of the three layer norms of a fresh tiny model, two repeat the weights and biases of the first."""


def nbytes(program: Any) -> int:
    assert isinstance(program, Program)
    return sum(weight.nbytes for weight in program.weights.values())


def changed(change: Callable[[nn.Module], object], layers: int = 2) -> Model:
    """Return a tiny model whose norms all differ, after `change` of its module."""
    model = tiny.tiny(layers=layers)
    with torch.no_grad():
        for norm in (one for one in model.module.modules() if isinstance(one, nn.LayerNorm)):
            norm.weight.add_(torch.randn_like(norm.weight))
            norm.bias.add_(torch.randn_like(norm.bias))
        change(model.module)
    return model


def run(model: Model, passes: str = tiny.DEFAULT_PASSES) -> tuple[Program, Program, Any]:
    before = tiny.captured(model, passes).program
    after, (result,) = run_program(before, [PASS])
    return before, after, result


def copy_up(module: Any) -> None:
    module.blocks[1].up.weight.copy_(module.blocks[0].up.weight)


def test_equal_weights_are_stored_once(tmp_path: Path) -> None:
    check = check_pass(PASS, tiny.tiny(), matches=4)
    assert nbytes(check.before) - nbytes(check.after) == NORMS
    assert [match.where for match in check.result.matches] == [
        "blocks.1.norm.bias: 128 bytes, those of blocks.0.norm.bias",
        "norm.bias: 128 bytes, those of blocks.0.norm.bias",
        "blocks.1.norm.weight: 128 bytes, those of blocks.0.norm.weight",
        "norm.weight: 128 bytes, those of blocks.0.norm.weight",
    ]
    sizes = []
    for name, program in (("before", check.before), ("after", check.after)):
        assert isinstance(program, Program)
        storage.save(program, tmp_path / name)
        sizes.append((tmp_path / name / storage.STORAGES_FILE).stat().st_size)
    assert sizes[0] - sizes[1] >= NORMS


def test_every_method_sees_the_one_storage() -> None:
    _, after, _ = run(changed(copy_up))
    weight = after.weights["blocks.0.up.weight"]
    assert weight.names == ("blocks.0.up.weight", "blocks.1.up.weight")
    assert weight.users == ("decode", "prefill")
    assert len({storage_identity(use.tensor) for use in weight.uses}) == 1


def test_weights_that_methods_hold_apart_become_one() -> None:
    program = tiny.captured(changed(lambda module: None)).program
    decode = program.methods["decode"]
    own = {
        name: nn.Parameter(value.clone(), requires_grad=False) if name not in program.state else value
        for name, value in decode.exported.state_dict.items()
    }
    apart = program.with_methods(
        {
            **program.methods,
            "decode": dataclasses.replace(
                decode, exported=rebuild(decode.exported, decode.exported.graph_module, state_dict=own)
            ),
        }
    )
    assert nbytes(apart) > 1.9 * nbytes(program)
    after, _ = run_program(apart, [PASS])
    assert nbytes(after) == nbytes(program)


def test_state_is_never_merged() -> None:
    before, after, _ = run(changed(copy_up))
    rows = {name: storage_identity(row.initial) for name, row in after.state.items()}
    assert len(set(rows.values())) == len(rows) == 4
    assert rows == {name: storage_identity(row.initial) for name, row in before.state.items()}


def test_only_bits_count() -> None:
    def negative_zero(module: Any) -> None:
        module.blocks[0].norm.bias.zero_()
        module.blocks[1].norm.bias.copy_(-torch.zeros(tiny.WIDTH))

    def nan(module: Any) -> None:
        for block in module.blocks:
            block.norm.bias.copy_(torch.arange(tiny.WIDTH).float())
            block.norm.bias[3] = float("nan")

    assert run(changed(negative_zero))[2].matches == ()
    assert len(run(changed(nan))[2].matches) == 1


def test_equal_bytes_in_another_form_stay() -> None:
    class Forms(tiny.TinyAttention):
        def __init__(self) -> None:
            super().__init__()
            values = torch.randn(tiny.WIDTH)
            self.a = nn.Parameter(values.clone())
            self.b = nn.Parameter(values.clone().reshape(1, tiny.WIDTH))
            self.register_buffer("c", values.clone().view(torch.int32))
            self.c: Tensor

        def forward(self, x: Tensor) -> Tensor:
            attended: Tensor = super().forward(x)
            return attended + self.a * self.b + self.c.float() * 1e-9

    torch.manual_seed(0)
    model = tiny.tiny(Forms())
    assert [match.where for match in run(model)[2].matches] == [
        "norm.bias: 128 bytes, those of blocks.0.norm.bias",
        "norm.weight: 128 bytes, those of blocks.0.norm.weight",
    ]


def test_a_transposed_weight_is_named_and_left() -> None:
    def transpose(module: Any) -> None:
        module.blocks[0].down.weight.copy_(module.blocks[0].up.weight.t())

    result = run(changed(transpose, layers=1))[2]
    assert result.matches == ()
    assert [str(one) for one in result.refusals] == [
        "blocks.0.up.weight: it is blocks.0.down.weight transposed; a target takes a weight as it lies in memory"
    ]


def test_tied_parts_of_one_storage_are_left() -> None:
    class Parts(tiny.TinyAttention):
        def __init__(self) -> None:
            super().__init__()
            both = torch.ones(2, tiny.WIDTH)
            self.a = nn.Parameter(both[0])
            self.b = nn.Parameter(both[1])

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.a + self.b

    refusals = {one.where: one.reason for one in run(tiny.tiny(Parts()))[2].refusals}
    assert refusals == {"blocks.0.attention.a": "its storage is seen in 2 ways"}


def test_quantized_weights_keep_their_integers_and_share_zero_points() -> None:
    quantized = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa"
    before, after, result = run(changed(lambda module: None), quantized)
    assert {match.where.partition(":")[0].rpartition(".")[2] for match in result.matches} == {"original2"}
    assert nbytes(after) < nbytes(before)


def test_merging_what_differs_in_one_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.passes.deduplicate_weights._digest", lambda data: b"")
    monkeypatch.setattr(torch, "equal", lambda one, other: True)
    with pytest.raises(Exception, match="computes something else"):
        check_pass(PASS, tiny.tiny(), matches=4)
