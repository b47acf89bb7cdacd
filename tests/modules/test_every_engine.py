"""Each cache and operator in eager, exported and in a ``.pte``: outputs and state after every call agree.

``test_aotinductor.py`` does the same for AOTInductor.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.modules import cases
from tests.modules.engines import CHEAP, captured_calls, run_everywhere, together

SINGLES = (1,) * 9


@pytest.mark.parametrize("name", cases.CACHES)
def test_a_cache_is_the_same_everywhere(name: str) -> None:
    run_everywhere(*cases.cached(cases.CACHES[name]), engines=["export"])


def test_caches_are_the_same_in_a_pte() -> None:
    run_everywhere(*together(*map(cases.cached, cases.CACHES.values())), engines=["executorch"])


def test_caches_are_the_same_in_a_pte_that_takes_one_position() -> None:
    """Rings take another way there: the write comes first, and attention needs no mask."""
    run_everywhere(*together(*(cases.cached(one, SINGLES) for one in cases.CACHES.values())), engines=CHEAP)


def test_masks_soft_caps_wide_values_and_tables_are_the_same() -> None:
    run_everywhere(*together(cases.masked(), cases.table()), engines=CHEAP)


def test_portable_kernels_give_the_same() -> None:
    subjects = (cases.ring(sink=2), cases.int8())
    run_everywhere(*together(*map(cases.cached, subjects)), engines=["executorch"], target="portable")


# ------------------------------------------------------------------------------------------------ the comparison sees


class Lies(nn.Module):
    """Computes something else once it is exported, or keeps another state."""

    def __init__(self, *, in_state: bool) -> None:
        super().__init__()
        self.in_state = in_state
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        error = 1e-2 if torch.compiler.is_exporting() else 0.0
        self.count.add_(1 + error * self.in_state)
        return x + 0 * self.count + (0.0 if self.in_state else error)


class Counts(nn.Module):
    """Adds up what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.total.add_(x)
        return self.total.clone()


@pytest.mark.parametrize(("in_state", "where"), [(False, "export, call 0, output 0"), (True, "export, state count")])
def test_a_difference_is_seen_and_placed(in_state: bool, where: str) -> None:
    with pytest.raises(AssertionError, match=where):
        run_everywhere(Lies(in_state=in_state), [(torch.ones(2),), (torch.zeros(2),)], engines=["export"])


def test_state_flows_from_call_to_call() -> None:
    (first,), (second,) = run_everywhere(Counts(), [(torch.ones(1),), (torch.ones(1),)], engines=["export"])
    assert (first.item(), second.item()) == (1, 2)


def test_lengths_that_differ_between_calls_are_dynamic() -> None:
    captured = captured_calls(*cases.cached(cases.static()))
    (method,) = captured.program.methods.values()
    assert [str(port.shape[2]) for port in method.inputs[:3]] == [str(method.inputs[0].shape[2])] * 3
    assert not isinstance(method.inputs[0].shape[2], int)
    assert method.inputs[3].shape == (1,)
