"""torchtune's own attention goes through `cond-attention` to a ``.pte`` that computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.torchtune import models
from triptych.compiler.model import CONTEXT, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.roles import OTHER
from triptych.compiler.stages import Captured, Source
from triptych.compiler.targets.pte import read_pte
from triptych.manifest import DynamicDim, TensorSignature
from triptych.runtime.loaders import load_runner

LENGTH = 5
NAN = torch.full((1, LENGTH, models.WIDTH), torch.nan)


def described(attention: nn.Module) -> Model:
    """The branch of the module: a call with encoder input, or a later one without."""

    def attend(root: Any, x: Tensor, states: Tensor, _present: Tensor) -> Tensor:
        attended: Tensor = root["attention"](x, states)
        return attended

    inputs = (
        TensorSignature("x", "float32", (1, DynamicDim("S", 1, CONTEXT), models.WIDTH)),
        TensorSignature("encoder_states", "float32", (1, LENGTH, models.WIDTH)),
        TensorSignature("encoder_present", "bool", (1,)),
    )
    entry = EntryPoint("attend", frozenset({OTHER}), attend, inputs, (OutputPort("attended"),))
    return Model(nn.ModuleDict({"attention": attention}), (entry,), Metadata(CONTEXT_LENGTH, CONTEXT_LENGTH, 8))


CONTEXT_LENGTH = 16


@pytest.fixture(scope="module", params=[(2, True), (4, False)], ids=["grouped, normalized", "plain"])
def attention(request: pytest.FixtureRequest) -> nn.Module:
    kv_heads, norms = request.param
    return models.attention(kv_heads=kv_heads, norms=norms)


@pytest.fixture(scope="module")
def captured(attention: nn.Module) -> Captured:
    source = Source(described(attention)).transform("cond-attention")
    assert [match.where for match in source.results[0].matches] == ["attention"]
    return source.capture()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["eager", "xnnpack"])
def test_new_kept_and_replaced_encoder_inputs(
    captured: Captured, attention: nn.Module, target: str, tmp_path: Path
) -> None:
    artifact = captured.lower(target).save(tmp_path / "artifact")
    first, second = torch.randn(2, 1, LENGTH, models.WIDTH)
    steps = (
        (first, True, first),
        (NAN, False, first),
        (NAN, False, first),
        (second, True, second),
        (NAN, False, second),
    )
    with load_runner(artifact.path, artifact.manifest) as runner:
        for index, (given, present, attended) in enumerate(steps):
            x = torch.randn(1, 1 + 3 * (index % 2), models.WIDTH)
            got = runner.run("attend", x=x, encoder_states=given, encoder_present=torch.tensor([present]))["attended"]
            with torch.no_grad():
                torch.testing.assert_close(got, attention(x, attended), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_its_projections_are_delegated(captured: Captured, tmp_path: Path) -> None:
    artifact = captured.lower("xnnpack").save(tmp_path / "artifact")
    method = read_pte(artifact.path / "model.pte").methods["attend"]
    assert method.delegates["XnnpackBackend"] >= 1
    assert len(method.weights) >= 4
    assert not [one for one in method.operators if "linear" in one or "mm" in one]
