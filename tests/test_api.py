"""The public surface: pinned, documented, and every option does something."""

import inspect
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import triptych
from tests.compiler.tiny import tiny
from triptych import api
from triptych.errors import PipelineError, RecipeError, TriptychError, UsageError
from triptych.manifest import Manifest

SURFACE = {
    "Artifact",
    "Captured",
    "EntryPoint",
    "Lowered",
    "Metadata",
    "Model",
    "MultimodalRunner",
    "Runner",
    "Source",
    "TextRunner",
    "TriptychError",
    "__version__",
    "export",
    "load",
}


def test_public_names_are_these_and_resolve() -> None:
    assert set(triptych.__all__) == SURFACE
    assert all(getattr(triptych, name) is not None for name in SURFACE)


def test_every_option_of_export_is_documented() -> None:
    text = inspect.getdoc(api.export) or ""
    missing = [name for name in inspect.signature(api.export).parameters if f"{name}: " not in text]
    assert missing == []


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"target": "eager"}, {"target": "eager"}),
        ({"target": "portable"}, {"target": "portable"}),
        ({"target": "eager", "recipe": "8da4w"}, {"recipe": "8da4w"}),
        (
            {"target": "eager", "pipeline": "static-kv-cache{max=12},capture"},
            {"pipeline": "static-kv-cache{max=12},capture", "max_context": 12},
        ),
    ],
)
def test_options_of_export_show_in_the_manifest(
    options: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    artifact = triptych.export(tiny(), out=tmp_path / "artifact", **options)
    read = Manifest.load(artifact.path)
    assert read == artifact.manifest
    assert {name: getattr(read, name) for name in wanted} == wanted


def test_max_context_and_progress_take_effect(demo_checkpoint: Path) -> None:
    heard: list[str] = []
    source = triptych.export(demo_checkpoint, max_context=96, progress=heard.append)
    assert source.model.metadata.max_context == 96
    assert heard == ["load model"]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"target": "tpu"}, UsageError),
        ({"recipe": "int3"}, RecipeError),
        ({"target": "portable", "recipe": "8da4w"}, RecipeError),
        ({"pipeline": "static-kv-cache"}, UsageError),
        ({"pipeline": "swap-sdpa,capture"}, PipelineError),
        ({"pipeline": "quantize{recipe=8da4w},capture", "recipe": "8da4w"}, UsageError),
        ({"target": "portable", "pipeline": "quantize{recipe=8da4w},capture"}, RecipeError),
        ({"abi": "c89"}, UsageError),
        ({"max_context": 12}, UsageError),
    ],
)
def test_impossible_options_are_refused_and_nothing_is_written(
    options: dict[str, Any], error: type[TriptychError], tmp_path: Path
) -> None:
    with pytest.raises(error) as raised:
        triptych.export(tiny(), out=tmp_path / "artifact", **options)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_options_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(UsageError, match="ignores target"):
        triptych.export(tiny(), target="eager")  # type: ignore[call-overload]


def test_stages_do_not_change_one_another(tmp_path: Path) -> None:
    source = triptych.export(tiny())
    cached = source.transform("static-kv-cache")
    captured = cached.capture()
    sliced = captured.rewrite("last-token-logits")
    assert source.pipeline.passes == ()
    assert not [name for name, _ in source.model.module.named_buffers()]
    assert captured.program.methods["prefill"].outputs != sliced.program.methods["prefill"].outputs
    first = captured.lower("eager").save(tmp_path / "all")
    second = sliced.lower("eager").save(tmp_path / "last")
    shapes = [len(one.manifest.methods["prefill"].outputs[0].shape) for one in (first, second)]
    assert shapes == [3, 2]


def test_manifest_follows_its_published_schema(demo_eager: Path) -> None:
    schema = json.loads((Path(api.__file__).parent / "manifest.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    manifest = json.loads((demo_eager / "triptych.json").read_text(encoding="utf-8"))
    jsonschema.validate(manifest, schema)
    del manifest["state"][0]["owner"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest, schema)
