"""`expand-norms` spells norms over the last axis out, and leaves the others."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.rules import S, applied, captured, targets
from triptych.passes.expand_norms import ExpandNorms


class Norms(nn.Module):
    """Norms in all their forms: with and without weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(6, eps=1e-3)
        self.rms = nn.RMSNorm(6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.rms(self.layer(x)) + F.rms_norm(x, [6], eps=0.1) + F.layer_norm(x, [6], self.layer.weight)


class OverTwoAxes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, [3, 6]) + F.rms_norm(x, [6])


@pytest.mark.parametrize("length", [2, 5])
def test_every_norm_becomes_arithmetic(length: int) -> None:
    rewritten, result = applied(captured(Norms(), (1, S, 6)), ExpandNorms(), 10 * torch.randn(1, length, 6) + 3)
    assert len(result.matches) == 4
    found = targets(rewritten)
    assert not any("norm" in name for name in found)
    assert found.count("aten.mean.dim") == 6  # two for each layer norm, one for each RMS norm


def test_a_norm_over_two_axes_stays() -> None:
    rewritten, result = applied(captured(OverTwoAxes(), (2, 3, 6)), ExpandNorms(), torch.randn(2, 3, 6))
    assert len(result.matches) == 1
    assert [refusal.reason for refusal in result.refusals] == ["it is over the last 2 axes; one is expanded"]
    assert "aten.layer_norm.default" in targets(rewritten)
