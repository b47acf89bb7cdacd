"""A hand-written module with hand-written entry points, from source to an artifact that agrees with its own forward."""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler.model import CONTEXT, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES
from triptych.compiler.roles import OTHER
from triptych.compiler.stages import Source
from triptych.compiler.trace import CallTrace, compare, reference, replay
from triptych.errors import ModelError, PipelineError, UsageError, VerificationError
from triptych.manifest import DynamicDim, Manifest, TensorSignature
from triptych.runtime.loaders import load_runner

FP32 = DEFAULT_TOLERANCES["float32"]
TRACES = (
    tiny.trace(("prefill", 1), ("decode", 6), name="one token"),
    tiny.trace(("decode", 8), name="decode from the start"),
    tiny.trace(("prefill", 17), ("decode", 4), name="long prompt"),
    tiny.trace(("prefill", 5), ("prefill", 4), ("decode", 3), name="chunked prefill"),
    tiny.trace(("prefill", 6), ("decode", 3), ("prefill", 5), ("decode", 3), name="second turn"),
    tiny.trace(("prefill", 24), name="the whole context"),
)


def failures(model: Model, folder: Path, trace: CallTrace) -> tuple[str, ...]:
    """Hold the artifact in `folder` to the model's own forward."""
    manifest = Manifest.load(folder)
    methods = {role: name for name, method in manifest.methods.items() for role in method.roles}
    with load_runner(folder, manifest) as runner:
        got = replay(runner, trace, methods)
    comparison = compare(trace, reference(model, trace), got, FP32)
    assert len(comparison.state) == 2 * 2, "the comparison saw the keys and values of both layers"
    return comparison.failures(FP32)


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "swapped"
    return tiny.captured().rewrite("last-token-logits").lower("eager").save(folder).path


@pytest.fixture(scope="module")
def cached_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "cached"
    return tiny.captured(passes="static-kv-cache").lower("eager").save(folder).path


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_the_whole_pipeline_agrees_with_the_modules_own_forward(swapped: Path, trace: CallTrace) -> None:
    assert not failures(tiny.tiny(), swapped, trace)


@pytest.mark.parametrize("trace", TRACES[-2:], ids=lambda trace: trace.name)
def test_the_cache_alone_agrees_with_the_modules_own_forward(cached_only: Path, trace: CallTrace) -> None:
    assert not failures(tiny.tiny(), cached_only, trace)


def test_a_model_with_other_weights_does_not_agree(swapped: Path) -> None:
    assert failures(tiny.tiny(seed=1), swapped, TRACES[0])


def test_a_model_with_one_scaled_layer_does_not_agree(swapped: Path) -> None:
    model = tiny.tiny()
    with torch.no_grad():
        model.module.get_parameter("blocks.1.down.weight").mul_(1.5)
    assert failures(model, swapped, TRACES[0])


# ------------------------------------------------------------------------------------------------ what capture leaves


def test_the_users_module_is_left_as_it_was() -> None:
    model = tiny.tiny()
    module = model.module.train()
    tokens = torch.randint(0, tiny.VOCABULARY, (1, 9))
    before = (
        dict(module.named_parameters()),
        {name: tensor.clone() for name, tensor in module.state_dict().items()},
        [name for name, _ in module.named_modules()],
        module(tokens),
    )
    tiny.captured(model).rewrite("last-token-logits").lower("eager")
    assert all(dict(module.named_parameters())[name] is tensor for name, tensor in before[0].items())
    torch.testing.assert_close(dict(module.state_dict()), before[1], rtol=0, atol=0)
    assert [name for name, _ in module.named_modules()] == before[2]
    assert not [name for name, child in module.named_modules() if "forward" in vars(child) or child._forward_hooks]
    torch.testing.assert_close(module(tokens), before[3], rtol=0, atol=0)
    assert all(child.training for child in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_module_in_training_mode_is_captured_in_evaluation_mode() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5, self.training)

    program = _one_method(Noisy().train(), lambda module, x: module(x)).capture().program
    x = torch.ones(1, 16, 4)
    torch.testing.assert_close(program.methods["only"].exported.module()(x), x, rtol=0, atol=0)


def test_the_artifact_and_the_module_share_no_memory_after_saving(swapped: Path) -> None:
    model = tiny.tiny()
    saved = copy.deepcopy(model)
    with torch.no_grad():
        model.module.get_parameter("blocks.0.up.weight").zero_()
    assert not failures(saved, swapped, TRACES[0])


def test_weights_are_shared_with_the_module_until_then() -> None:
    model = tiny.tiny(layers=1)
    bound = tiny.captured(model).program.methods["decode"].exported.state_dict["blocks.0.up.weight"]
    assert bound.data_ptr() == model.module.get_parameter("blocks.0.up.weight").data_ptr()


# ------------------------------------------------------------------------------------------------ descriptions


def _one_method(module: nn.Module, forward: Callable[..., object], outputs: tuple[str, ...] = ("y",)) -> Source:
    port = TensorSignature("x", "float32", (1, DynamicDim("S", 1, CONTEXT), 4))
    entry = EntryPoint("only", frozenset({OTHER}), forward, (port,), tuple(map(OutputPort, outputs)))
    return Source(Model(module, (entry,), Metadata(16, 16, 1)))


def test_outputs_get_the_shapes_of_the_graph() -> None:
    program = _one_method(nn.Linear(4, 3), lambda module, x: (module(x), x.half()), ("y", "z")).capture().program
    sequence = DynamicDim("S", 1, 16)
    assert program.methods["only"].outputs == (
        TensorSignature("y", "float32", (1, sequence, 3)),
        TensorSignature("z", "float16", (1, sequence, 4)),
    )


@pytest.mark.parametrize("names", [(), ("y", "z")], ids=["none", "two"])
def test_another_number_of_outputs_than_described_is_an_error(names: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match=f"returns 1 tensors, its description names {len(names)}"):
        _one_method(nn.Linear(4, 3), lambda module, x: module(x), names).capture()


def test_an_output_that_is_no_tensor_is_an_error() -> None:
    with pytest.raises((ModelError, VerificationError), match="output 'y' is str, expected a tensor"):
        _one_method(nn.Linear(4, 3), lambda module, x: "text").capture()


def test_an_entry_point_that_branches_on_data_is_named() -> None:
    with pytest.raises(ModelError, match="entry point 'only' of Linear does not export") as caught:
        _one_method(nn.Linear(4, 3), lambda module, x: module(x) if x.sum() > 0 else x[..., :3]).capture()
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_an_entry_point_that_fixes_a_dynamic_size_is_named() -> None:
    with pytest.raises(ModelError, match="entry point 'only' of Linear does not export"):
        _one_method(nn.Linear(4, 3), lambda module, x: module(x.reshape(1, 8, 4))).capture()


def test_a_cache_under_an_entry_point_without_start_pos_is_explained() -> None:
    model = tiny.tiny(layers=1)
    decode = model.entry_points[2]
    fixed = dataclasses.replace(
        decode,
        inputs=decode.inputs[:1],
        forward=lambda module, tokens: tiny.decode(module, tokens, torch.zeros(1, dtype=torch.int64)),
    )
    broken = dataclasses.replace(model, entry_points=(*model.entry_points[:2], fixed))
    with pytest.raises(ModelError, match="'start_pos'"):
        tiny.captured(broken)


@pytest.mark.parametrize("count", [0, 2])
def test_a_description_has_entry_points_each_name_once(count: int) -> None:
    model = tiny.tiny(layers=1)
    with pytest.raises(ModelError, match="each name once"):
        dataclasses.replace(model, entry_points=model.entry_points[:1] * count)


def test_an_attention_made_by_the_root_module_itself_gets_its_cache() -> None:
    class Root(tiny.TinyAttention):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(tiny.VOCABULARY, tiny.WIDTH)
            self.head = nn.Linear(tiny.WIDTH, tiny.VOCABULARY)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().forward(x))

    model = tiny.describe(Root())
    model = tiny.with_entry_point(model, "prefill", forward=lambda module, embeds, start_pos: module(embeds))
    model = tiny.with_entry_point(
        model, "decode", forward=lambda module, tokens, start_pos: module(module.embedding(tokens))
    )
    assert set(tiny.captured(model).program.state) == {"routed_attention.cache.keys", "routed_attention.cache.values"}


# ------------------------------------------------------------------------------------------------ stages


def test_a_stage_does_not_change_the_one_before() -> None:
    source = Source(tiny.tiny(layers=1))
    cached = source.transform("static-kv-cache")
    assert (source.pipeline.passes, source.results) == ((), ())
    assert not source.capture().program.state
    assert cached.capture().program.state


def test_a_source_pass_of_a_later_stage_may_require_one_of_an_earlier() -> None:
    staged = Source(tiny.tiny(layers=1)).transform("static-kv-cache").transform("swap-sdpa")
    assert [result.name for result in staged.results] == ["static-kv-cache", "swap-sdpa"]


@pytest.mark.parametrize("text", ["static-kv-cache,capture", "last-token-logits"])
def test_transform_takes_source_passes_only(text: str) -> None:
    with pytest.raises(PipelineError, match="capture"):
        Source(tiny.tiny(layers=1)).transform(text)


def test_rewrite_takes_no_source_pass() -> None:
    with pytest.raises(PipelineError, match="swap-sdpa changes the module: put it before 'capture'"):
        tiny.captured(tiny.tiny(layers=1), "static-kv-cache").rewrite("swap-sdpa")


def test_a_described_model_exports_in_one_call(tmp_path: Path) -> None:
    import triptych

    artifact = triptych.export(
        tiny.tiny(),
        out=tmp_path / "artifact",
        target="eager",
        pipeline="static-kv-cache,swap-sdpa,capture,last-token-logits",
    )
    assert not failures(tiny.tiny(), artifact.path, TRACES[3])
    assert artifact.manifest.pipeline == "static-kv-cache,swap-sdpa,capture,last-token-logits"


def test_options_that_need_out_are_refused_without_it() -> None:
    import triptych

    with pytest.raises(UsageError, match=r"ignores target, recipe; add out="):
        triptych.export(tiny.tiny(), target="eager", recipe="fp32")  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "moon"}, "no target is called 'moon'; known: .*eager.*portable.*xnnpack"),
        ({"recipe": "2bit"}, "no recipe is called '2bit'; known: fp32, 8da4w"),
        ({"abi": "other"}, "no ABI is called 'other'; known: triptych"),
        ({"pipeline": "static-kv-cache"}, "has no 'capture'"),
        ({"pipeline": "quantize{recipe=8da4w},capture", "recipe": "8da4w"}, "quantizes already"),
        ({"max_context": 8}, "states its own max_context"),
        ({"target": "portable", "recipe": "8da4w"}, "portable cannot lower recipe 8da4w.*use recipe fp32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_an_impossible_option_is_refused_before_any_work(
    tmp_path: Path, options: dict[str, object], message: str
) -> None:
    import triptych

    heard: list[str] = []
    with pytest.raises(UsageError, match=message):
        triptych.export(tiny.tiny(), out=tmp_path / "artifact", progress=heard.append, **options)  # type: ignore[call-overload]
    assert not heard
    assert not list(tmp_path.iterdir())


def test_a_quantize_pass_behind_the_portable_targets_back_is_refused_before_lowering(tmp_path: Path) -> None:
    import triptych

    heard: list[str] = []
    with pytest.raises(UsageError, match="portable cannot lower recipe 8da4w"):
        triptych.export(
            tiny.tiny(),
            out=tmp_path / "artifact",
            target="portable",
            pipeline="quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture,last-token-logits",
            progress=heard.append,
        )
    assert not [stage for stage in heard if stage.startswith("capture")], "the work had begun"
    assert not list(tmp_path.iterdir())
