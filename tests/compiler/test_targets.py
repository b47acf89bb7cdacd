"""Targets through ExecuTorch's other partitioners: what is in the file, what stays outside, and what is refused."""

import dataclasses
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from tests.cli.conftest import Command, triptych  # noqa: F401  # a fixture
from tests.compiler import tiny
from triptych.compiler import registry
from triptych.compiler.partition_explainer import Partition
from triptych.compiler.quantize.recipes import find_recipe
from triptych.compiler.targets.base import TARGET_GROUP, find_target, target_names
from triptych.compiler.targets.coreml import CoreML
from triptych.compiler.targets.missing_sdk import MISSING_SDK
from triptych.compiler.targets.partitioners import IN_SHARED_STATE, SYMBOLIC
from triptych.compiler.targets.portable import Portable
from triptych.compiler.targets.pte import read_pte
from triptych.errors import ArtifactError, LoweringError, RecipeError, UsageError
from triptych.manifest import Manifest
from triptych.runtime.loaders import load_runner

BACK_ENDS = {"coreml": "CoreMLBackend", "vulkan": "VulkanBackend"}


# ------------------------------------------------------------------------------------------------ by name


def test_the_targets_that_lower_here_are_these() -> None:
    assert {"coreml", "eager", "portable", "vulkan", "xnnpack"} <= set(target_names())
    assert not {"base", "executorch", "partitioners", "pte-target", "missing-sdk"} & set(target_names())


@pytest.mark.parametrize(
    ("name", "needed"),
    [
        ("qualcomm", "QNN_SDK_ROOT"),
        ("mediatek", "NeuroPilot"),
        ("openvino", r"pip install 'executorch\[openvino\]'"),
        ("mps", "static lengths.*target coreml"),
    ],
)
def test_a_partitioner_without_its_sdk_is_refused_by_name(name: str, needed: str) -> None:
    with pytest.raises(UsageError, match=f"target {name} is not built in.* needs .*{needed}.*use one of coreml, eager"):
        find_target(name)


def test_no_refused_name_is_a_target_and_each_is_one_line() -> None:
    assert not set(MISSING_SDK) & set(target_names())
    for name in MISSING_SDK:
        with pytest.raises(UsageError) as raised:
            find_target(name)
        assert "\n" not in str(raised.value)


def test_a_name_that_nobody_knows_is_told_so() -> None:
    with pytest.raises(UsageError, match="no target is called 'abacus'"):
        find_target("abacus")


def test_a_package_may_offer_a_target_that_is_not_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("qualcomm", f"{Portable.__module__}:Portable", TARGET_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == TARGET_GROUP else [])
    assert find_target("qualcomm") is Portable


# ------------------------------------------------------------------------------------------------ recipes and packages


@pytest.mark.parametrize("name", ["coreml", "vulkan", "portable"])
def test_a_quantized_recipe_is_refused_with_its_layers_and_another_way(name: str) -> None:
    with pytest.raises(
        RecipeError, match=f"target {name} cannot lower recipe 8da4w: .*of decoder, lm_head; use recipe"
    ):
        find_target(name)().check(find_recipe("8da4w"))
    find_target(name)().check(find_recipe("fp32"))


def test_core_ml_without_coremltools_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(LoweringError, match=r"target coreml needs coremltools .*pip install coremltools"):
        tiny.captured(tiny.tiny(layers=1)).lower("coreml")


# ------------------------------------------------------------------------------------------------ in the file


@pytest.fixture(scope="module", params=list(BACK_ENDS))
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """The tiny model with one layer, lowered for a GPU or a phone; its tokenizer is another model's."""
    model = dataclasses.replace(tiny.tiny(layers=1), tokenizer_file=demo_checkpoint / "tokenizer.json")
    captured = tiny.captured(model).rewrite("last-token-logits")
    return captured.lower(str(request.param)).save(tmp_path_factory.mktemp("targets") / str(request.param)).path


@pytest.mark.slow
def test_every_method_has_delegates_of_that_back_end_alone(artifact: Path) -> None:
    methods = read_pte(artifact / "model.pte").methods
    assert set(methods) == {"token_embedding", "prefill", "decode"}
    for method in methods.values():
        assert set(method.delegates) == {BACK_ENDS[artifact.name]}


@pytest.mark.slow
def test_linear_algebra_is_inside_and_attention_outside(artifact: Path) -> None:
    for name in ("prefill", "decode"):
        operators = read_pte(artifact / "model.pte").methods[name].operators
        assert operators["llama::custom_sdpa.out"] == 1
        assert operators["llama::update_cache.out"] == 2
        assert not [one for one in operators if any(word in one for word in ("linear", "mm", "gelu", "layer_norm"))]


@pytest.mark.slow
def test_no_delegate_keeps_the_cache_to_itself(artifact: Path) -> None:
    """A delegate with a cache of its own would leave decode blind for what prefill wrote."""
    methods = read_pte(artifact / "model.pte").methods
    rows = {row.name for row in Manifest.load(artifact).state}
    assert len(rows) == 2
    for row in rows:
        assert methods["prefill"].state[row] == methods["decode"].state[row]


@pytest.mark.slow
def test_the_dynamic_length_stays_in_the_signature(artifact: Path) -> None:
    (size,) = [size for size in Manifest.load(artifact).methods["prefill"].input("embeds").shape if size not in (1, 32)]
    assert size == tiny.DynamicDim("S", 1, tiny.CONTEXT_LENGTH)


@pytest.mark.slow
def test_loading_says_which_back_end_is_not_here(artifact: Path) -> None:
    wanted = f"has delegates of {BACK_ENDS[artifact.name]}, which this ExecuTorch runtime lacks .*XnnpackBackend"
    with pytest.raises(ArtifactError, match=wanted):
        load_runner(artifact, Manifest.load(artifact))


@pytest.mark.slow
def test_running_is_one_line_and_inspecting_works(artifact: Path, triptych: Command) -> None:  # noqa: F811
    ran = triptych("run", artifact, "--prompt", "x")
    assert ran.code == 1
    assert BACK_ENDS[artifact.name] in ran.error
    inspected = triptych("inspect", artifact, "--json")
    assert inspected.code == 0, inspected.err
    assert json.loads(inspected.out)["methods"]["decode"]["delegates"][BACK_ENDS[artifact.name]] > 0


@pytest.mark.slow
def test_what_is_outside_has_its_reason(artifact: Path) -> None:
    methods = Partition.load(artifact).methods
    reasons = {one.operator: one.reason for one in methods["prefill"].outside}
    assert reasons["llama::custom_sdpa.out"] == "a kernel of llama::, called as it is"
    wanted = {"coreml": SYMBOLIC, "vulkan": "Vulkan: no dynamic shape support"}[artifact.name]
    assert reasons["aten::arange.start_out"] == wanted
    assert "aten::arange.start_out" not in {one.operator for one in methods["decode"].outside}


@pytest.mark.slow
def test_operators_that_touch_state_stay_outside(tmp_path: Path) -> None:
    """Here the cache is written and read by aten operators, which Core ML would take."""

    class Plain(CoreML):
        def pipeline(self) -> str:
            return "legalize-aten"

    captured = tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits")
    saved = captured.lower(Plain()).save(tmp_path / "artifact")
    file = read_pte(saved.path / "model.pte")
    for row in saved.manifest.state:
        assert file.methods["prefill"].state[row.name] == file.methods["decode"].state[row.name]
    reasons = {one.operator: one.reason for one in Partition.load(saved.path).methods["decode"].outside}
    assert IN_SHARED_STATE in reasons.values(), reasons
