"""XNNPACK takes slices of tensors of dynamic length: in one delegate, and right at every length."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.modules.engines import captured_calls, run_everywhere
from triptych.compiler.targets.pte import PteMethod, read_pte

LENGTHS = (5, 1, 33, 2)


class Gated(nn.Module):
    """A stacked projection whose halves are multiplied, and a half turn of the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.both = nn.Linear(8, 24)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, dim=-1)
        y = self.down(F.silu(gate) * up)
        return torch.cat((-y[..., 4:], y[..., :4]), dim=-1)


class FixedSize(nn.Module):
    """A slice of a tensor of fixed size, which XNNPACK takes by its own rule."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:3] * 2


class OtherSlices(nn.Module):
    """Along the axis of dynamic size, and in steps."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2)[:, -1:] + (x * 3)[..., ::8]


def calls(*lengths: int) -> list[tuple[Tensor, ...]]:
    return [(torch.randn(1, length, 8),) for length in lengths]


def lowered(module: nn.Module, folder: Path, *lengths: int) -> PteMethod:
    captured_calls(module.eval(), calls(*lengths)).lower("xnnpack").save(folder / "artifact")
    (method,) = read_pte(folder / "artifact" / "model.pte").methods.values()
    return method


def test_slices_of_dynamic_tensors_are_right_at_every_length() -> None:
    run_everywhere(Gated().eval(), calls(*LENGTHS), engines=("executorch",), rtol=1e-6, atol=1e-6)


def test_they_do_not_leave_the_delegate(tmp_path: Path) -> None:
    method = lowered(Gated(), tmp_path, *LENGTHS)
    assert method.delegates == {"XnnpackBackend": 1}
    assert not method.operators


def test_slices_of_fixed_size_are_as_before(tmp_path: Path) -> None:
    method = lowered(FixedSize(), tmp_path, 6)
    assert not method.operators
    run_everywhere(FixedSize(), calls(6, 6), engines=("executorch",))


def test_slices_along_the_dynamic_axis_and_in_steps_stay_outside(tmp_path: Path) -> None:
    method = lowered(OtherSlices(), tmp_path, *LENGTHS)
    assert method.operators["aten::slice_copy.Tensor_out"] == 2
    run_everywhere(OtherSlices(), calls(*LENGTHS), engines=("executorch",))
