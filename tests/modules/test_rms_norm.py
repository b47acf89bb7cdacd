"""The norm agrees with torch's, and becomes one XNNPACK delegate with nothing outside it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.modules.engines import CHEAP, captured_calls, run_everywhere, together
from triptych.compiler.targets.pte import read_pte
from triptych.compiler.targets.xnnpack import Xnnpack
from triptych.modules.rms_norm import RMSNorm, averaging, rms_norm

WIDTH = 64


def norm(**options: bool) -> RMSNorm:
    module = RMSNorm(WIDTH, 1e-6, **options)
    if module.weight is not None:
        nn.init.normal_(module.weight)
    return module


def reference(module: RMSNorm) -> Callable[[Tensor], Tensor]:
    """The norm of torch, with the gain that `module` stands for."""
    theirs = nn.RMSNorm(WIDTH, eps=1e-6)
    gain = torch.ones(WIDTH) if module.weight is None else module.weight.detach()
    theirs.weight = nn.Parameter(1 + gain if module.unit_offset else gain)
    return theirs


FORMS = {"plain": norm(), "one plus weight": norm(unit_offset=True), "no weight": norm(has_weight=False)}
CALLS: list[tuple[Tensor, ...]] = [(torch.randn(1, length, WIDTH),) for length in (7, 1, 12)]


@pytest.mark.parametrize("module", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_it_is_the_norm_of_torch(module: RMSNorm, scale: float) -> None:
    x = torch.randn(2, 5, WIDTH) * scale
    torch.testing.assert_close(module(x), reference(module)(x), rtol=2e-6, atol=1e-6)


def test_zeros_stay_zeros() -> None:
    assert not norm()(torch.zeros(1, 3, WIDTH)).any()


def test_the_epsilon_counts() -> None:
    x = torch.full((1, WIDTH), 1e-3)
    average, eps = averaging(WIDTH, 3e-6)
    torch.testing.assert_close(rms_norm(x, None, average, eps), torch.full((1, WIDTH), 0.5))


@pytest.mark.parametrize("module", FORMS.values(), ids=FORMS.keys())
def test_one_delegate_takes_all_of_it(module: RMSNorm, tmp_path: Path) -> None:
    captured_calls(module, CALLS).lower("xnnpack").save(tmp_path / "artifact")
    method = read_pte(tmp_path / "artifact" / "model.pte").methods["call"]
    assert method.delegates == {"XnnpackBackend": 1}
    assert not method.operators


def test_the_norm_of_torch_goes_in_whole_by_the_targets_passes(tmp_path: Path) -> None:
    captured = captured_calls(nn.RMSNorm(WIDTH, eps=1e-6), CALLS)
    captured.lower("xnnpack").save(tmp_path / "artifact")
    method = read_pte(tmp_path / "artifact" / "model.pte").methods["call"]
    assert method.delegates == {"XnnpackBackend": 1}
    assert not method.operators


def test_without_them_it_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for this module: its form needs no pass."""
    monkeypatch.setattr(Xnnpack, "pipeline", lambda _: "legalize-executorch")
    captured_calls(nn.RMSNorm(WIDTH, eps=1e-6), CALLS).lower("xnnpack").save(tmp_path / "artifact")
    assert read_pte(tmp_path / "artifact" / "model.pte").methods["call"].operators


@pytest.mark.parametrize(
    "engines", [CHEAP, pytest.param(("aotinductor",), marks=pytest.mark.slow)], ids=["cheap", "aotinductor"]
)
def test_every_engine_agrees_at_every_length(engines: tuple[str, ...]) -> None:
    wanted = run_everywhere(*together(*((one, CALLS) for one in FORMS.values())), engines=engines, rtol=1e-6, atol=2e-6)
    for outputs, (x,) in zip(wanted, CALLS, strict=True):
        for got, module in zip(outputs, FORMS.values(), strict=True):
            torch.testing.assert_close(got, reference(module)(x), rtol=2e-6, atol=1e-6)
