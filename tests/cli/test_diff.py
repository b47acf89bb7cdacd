"""`triptych diff`: equal, different, not comparable, like diff(1)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from tests.compiler import tiny
from triptych.comparison import Change, compare
from triptych.compiler.stages import Source
from triptych.errors import UsageError
from triptych.manifest import MANIFEST_NAME

LAYERS = "blocks.0.attention.qkv.weight"


def changes(triptych: Command, first: Path, second: Path) -> dict[str, dict[str, Any]]:
    """The changes by section and item."""
    outcome = triptych("diff", first, second, "--json")
    assert outcome.code == 1, outcome.err
    content = json.loads(outcome.out)
    assert content["equal"] is False
    found: dict[str, dict[str, Any]] = content["changes"]
    return found


def save(folder: Path, *, layers: int = 1, seed: int = 0, recipe: str = "fp32", passes: str = "") -> Path:
    source = Source(tiny.tiny(layers=layers, seed=seed)).quantize(recipe).transform(tiny.DEFAULT_PASSES)
    captured = source.capture()
    return (captured.rewrite(passes) if passes else captured).lower("eager").save(folder).path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("diff") / "artifact", passes="last-token-logits")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff") / "program"
    tiny.captured(tiny.tiny(layers=1)).save_program(folder)
    return folder


# ------------------------------------------------------------------------------------------------ equal


def test_an_artifact_and_its_copy_are_equal(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    outcome = triptych("diff", artifact, tmp_path / "copy")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("equal: ")
    assert json.loads(triptych("diff", artifact, tmp_path / "copy", "--json").out)["changes"] == {}


def test_an_export_and_the_same_export_again_are_equal(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    again = save(tmp_path / "again", passes="last-token-logits")
    assert triptych("diff", artifact, again).code == 0


# ------------------------------------------------------------------------------------------------ different


def test_other_values_of_equal_form_differ_in_content_alone(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", seed=1, passes="last-token-logits")
    found = changes(triptych, artifact, other)
    files = {"eager/storages.safetensors", MANIFEST_NAME}
    assert {section: set(items) for section, items in found.items()} == {"content": files}


def test_a_pass_shows_in_signature_operators_and_pipeline(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    found = changes(triptych, save(tmp_path / "before"), artifact)
    assert found["signatures"]["prefill: output logits"] == {
        "before": "float32[1, S=1..24, 48] to sampler",
        "after": "float32[1, 48] to sampler",
    }
    assert found["operators"]["prefill: aten.select.int"]["delta"] > 0
    assert found["metadata"]["pipeline"]["after"] == "static-kv-cache,swap-sdpa,capture,last-token-logits"
    assert not {"quantization", "state", "methods"} & set(found)


def test_a_recipe_shows_in_the_formats_of_weights_by_name(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    found = changes(triptych, artifact, save(tmp_path / "small", recipe="8da4w", passes="last-token-logits"))
    assert found["metadata"]["recipe"] == {"before": "fp32", "after": "8da4w"}
    assert found["quantization"][LAYERS]["before"] == "float32[96, 32], used by decode, prefill"
    assert found["quantization"][LAYERS]["after"].startswith("int8[96, 32] + float32[96, 1]")
    assert found["sizes"]["weights in bytes"]["delta"] < -20_000


def test_another_layer_adds_state_weights_and_bytes(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    found = changes(triptych, artifact, save(tmp_path / "deep", layers=2, passes="last-token-logits"))
    assert len(found["state"]) == 2
    assert all(change["before"] is None for change in found["state"].values())
    assert found["sizes"]["state in bytes"]["delta"] == 2 * 24 * tiny.WIDTH * 4
    assert found["quantization"]["blocks.1.up.weight"]["before"] is None
    gelu = found["operators"]["decode: aten.gelu.default"]
    assert (gelu["before"], gelu["after"], gelu["delta"]) == (1, 2, 1)


def test_the_text_marks_what_came_what_went_and_what_changed(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    deep = save(tmp_path / "deep", layers=2, passes="last-token-logits")
    outcome = triptych("diff", deep, artifact)
    assert outcome.code == 1
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[:2] == [f"--- {deep}", f"+++ {artifact}"]
    assert "  ~ decode: aten.gelu.default: 2 → 1 (-1)" in lines
    assert "  - blocks.1.up.weight: float32[64, 32], used by decode, prefill" in lines
    assert [line for line in triptych("diff", artifact, deep).out.splitlines() if "+ blocks.1.up.weight" in line]


def test_long_sections_are_cut_in_the_text_and_whole_in_json(triptych: Command, tmp_path: Path) -> None:
    first, second = save(tmp_path / "one"), save(tmp_path / "four", layers=5)
    found = changes(triptych, first, second)["quantization"]
    assert len(found) > 20
    text = triptych("diff", first, second).out
    assert f"  … and {len(found) - 20} more; --json shows all" in text


def test_saved_programs(triptych: Command, program: Path, tmp_path: Path) -> None:
    tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits").save_program(tmp_path / "after")
    found = changes(triptych, program, tmp_path / "after")
    assert found["signatures"]["prefill: output logits"]["after"] == "float32[1, 48] to sampler"
    assert found["operators"]["prefill: aten.select.int"]["delta"] > 0
    assert triptych("diff", program, program).code == 0


@pytest.mark.slow
def test_pte_files(triptych: Command, tmp_path: Path) -> None:
    captured = tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits")
    portable, xnnpack = (captured.lower(name).save(tmp_path / name).path for name in ("portable", "xnnpack"))
    found = changes(triptych, portable / "model.pte", xnnpack / "model.pte")
    assert found["delegates"]["decode: XnnpackBackend"]["before"] is None
    assert found["delegates"]["decode: XnnpackBackend"]["delta"] > 0
    assert found["operators"]["decode: aten::mm.out"]["after"] is None
    assert "state" not in found
    whole = changes(triptych, portable, xnnpack)
    assert whole["delegates"] == found["delegates"]
    assert whole["metadata"]["target"] == {"before": "portable", "after": "xnnpack"}
    assert not [item for item, change in whole.get("quantization", {}).items() if change["before"]], "no weight went"


def test_whatever_else_the_manifest_says_is_seen(triptych: Command, artifact: Path, tmp_path: Path) -> None:
    shutil.copytree(artifact, tmp_path / "copy")
    path = tmp_path / "copy" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["eos_ids"] = [7]
    manifest["provenance"]["source"] = "elsewhere"
    path.write_text(json.dumps(manifest))
    found = changes(triptych, artifact, tmp_path / "copy")
    assert found["metadata"]["eos ids"] == {"before": [1], "after": [7]}
    assert found["metadata"]["provenance: source"]["after"] == "elsewhere"
    assert set(found) == {"metadata", "content", "sizes"}


# ------------------------------------------------------------------------------------------------ not comparable


def test_two_kinds_are_refused(triptych: Command, artifact: Path, program: Path) -> None:
    outcome = triptych("diff", artifact, program)
    assert outcome.code == 2
    assert f"cannot compare {artifact}, of kind artifact, with {program}, of kind program" in outcome.error


@pytest.mark.parametrize("kind", ["missing", "empty", "a text file", "damaged"])
def test_what_cannot_be_read_is_exit_code_2(triptych: Command, artifact: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "empty":
        path.mkdir()
    elif kind == "a text file":
        path.write_text("hello")
    elif kind == "damaged":
        shutil.copytree(artifact, path)
        (path / "eager" / "storages.safetensors").write_bytes(b"")
    outcome = triptych("diff", artifact, path)
    assert outcome.code == 2
    assert str(path) in outcome.error


# ------------------------------------------------------------------------------------------------ Python


def test_the_result_is_typed(artifact: Path, program: Path, tmp_path: Path) -> None:
    found = compare(artifact, save(tmp_path / "other", seed=1, passes="last-token-logits"))
    assert (found.kind, found.equal) == ("artifact", False)
    assert [change.item for change in found.changes] == ["eager/storages.safetensors", MANIFEST_NAME]
    assert found.section("content") == found.changes
    with pytest.raises(UsageError, match="give two artifacts"):
        compare(artifact, program)


@pytest.mark.parametrize(
    ("before", "after", "delta"), [(3, 5, 2), (None, 4, 4), (4, None, -4), ("a", "b", None), (True, False, None)]
)
def test_counts_have_a_delta_and_words_have_none(before: Any, after: Any, delta: int | None) -> None:
    assert Change("operators", "x", before, after).delta == delta
