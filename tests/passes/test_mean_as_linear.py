"""`mean-as-linear` replaces means over the last axis, with one row of weights for all methods."""

import torch
from torch import Tensor, nn

from tests.compiler.rules import S, applied, captured, targets
from tests.compiler.tiny import captured as tiny_program
from tests.compiler.tiny import tiny
from triptych.compiler.manager import run_program
from triptych.passes.expand_norms import ExpandNorms
from triptych.passes.mean_as_linear import MeanAsLinear
from triptych.testing import check_pass


class Means(nn.Module):
    """Two means that are replaced, four that stay."""

    def forward(self, x: Tensor) -> Tensor:
        kept = x.mean(1, keepdim=True) + x.mean((1, 2), keepdim=True) + x.mean(-1).unsqueeze(-1)
        in_double = x.mean(-1, keepdim=True, dtype=torch.float64).float()
        return x.mean(-1, keepdim=True) * x.mean(2, keepdim=True) + kept + in_double


def test_means_over_the_last_axis_become_linears() -> None:
    rewritten, result = applied(captured(Means(), (1, S, 6)), MeanAsLinear(), torch.randn(1, 5, 6))
    assert len(result.matches) == 2
    found = targets(rewritten)
    assert found.count("aten.linear.default") == 2
    assert found.count("aten.mean.dim") == 4
    assert [refusal.reason for refusal in result.refusals] == [
        "it is over the axes [1]; the last axis alone is replaced",
        "it is over the axes [1, 2]; the last axis alone is replaced",
        "it drops its axis or is not in float32",
        "it drops its axis or is not in float32",
    ]


def test_a_mean_over_a_dynamic_axis_stays() -> None:
    _, result = applied(captured(LastMean(), (2, S)), MeanAsLinear(), torch.randn(2, 7))
    assert [refusal.reason for refusal in result.refusals] == ["its axis has no fixed size"]


class LastMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


def test_methods_share_the_row() -> None:
    program, _ = run_program(tiny_program().program, [ExpandNorms(), MeanAsLinear()])
    (row,) = [weight for weight in program.weights.values() if weight.key.startswith("mean_of")]
    assert row.users == ("decode", "prefill")
    assert row.nbytes == 32 * 4


def test_parity_on_whole_conversations() -> None:
    # Three layer norms in each of two methods, two means in each norm.
    check_pass(
        MeanAsLinear(),
        tiny(),
        after="static-kv-cache,swap-sdpa,capture,expand-norms",
        matches={"prefill": 6, "decode": 6},
    )
