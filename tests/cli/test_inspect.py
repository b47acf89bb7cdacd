"""`triptych inspect`: methods, state and weights as the files have them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from triptych.manifest import Manifest


def inspected(triptych: Command, path: Path) -> dict[str, Any]:
    outcome = triptych("inspect", path, "--json")
    assert outcome.code == 0, outcome.err
    content: dict[str, Any] = json.loads(outcome.out)
    return content


def by_users(weights: list[dict[str, Any]], *users: str) -> int:
    return sum(weight["bytes"] for weight in weights if set(users) <= set(weight["users"]))


def test_an_eager_artifact(triptych: Command, demo_eager: Path) -> None:
    content = inspected(triptych, demo_eager)
    assert (content["kind"], content["target"], content["recipe"]) == ("artifact", "eager", "fp32")
    assert set(content["methods"]) == {"vision_encoder", "token_embedding", "prefill", "decode"}
    assert content["methods"]["prefill"]["inputs"] == ["embeds: float32[1, S=1..256, 128]", "start_pos: int64[1]"]
    assert content["methods"]["prefill"]["outputs"] == ["logits: float32[1, 435]"]
    assert content["methods"]["vision_encoder"]["roles"] == ["encoder(image)"]
    assert len(content["state"]) == 2 * 4
    for row in content["state"]:
        assert (set(row["readers"]), set(row["writers"])) == ({"prefill", "decode"},) * 2
        assert (row["shape"], row["layout"]) == ([1, 256, 2, 32], "BSHD")


def test_an_eager_artifacts_weights_stand_once_with_users_and_aliases(triptych: Command, demo_eager: Path) -> None:
    weights = inspected(triptych, demo_eager)["weights"]
    assert len({weight["name"] for weight in weights}) == len(weights)
    (tied,) = [weight for weight in weights if set(weight["users"]) == {"decode", "prefill", "token_embedding"}]
    assert tied["bytes"] == 435 * 128 * 4
    names = {tied["name"], *tied["aliases"]}
    assert any(name.endswith("lm_head.weight") for name in names), names
    assert any(name.endswith("embed_tokens.weight") for name in names), names
    assert by_users(weights, "prefill", "decode") > by_users(weights, "vision_encoder") > 0


@pytest.mark.slow
def test_a_pte_artifact(triptych: Command, demo_xnnpack: Path) -> None:
    content = inspected(triptych, demo_xnnpack)
    for name in ("prefill", "decode"):
        method = content["methods"][name]
        assert method["engine"] == "executorch"
        assert method["delegates"]["XnnpackBackend"] > 0
        assert method["undelegated_operators"]["llama::custom_sdpa.out"] == 4
    assert len(content["state"]) == 2 * 4
    for row in content["state"]:
        assert row["one_place"] is True
        assert row["nbytes"] == 256 * 2 * 32 * 4
    assert by_users(content["weights"], "prefill", "decode") > 1_000_000


@pytest.mark.slow
def test_a_pte_file_alone_says_what_the_artifact_says(triptych: Command, demo_xnnpack: Path) -> None:
    alone, whole = inspected(triptych, demo_xnnpack / "model.pte"), inspected(triptych, demo_xnnpack)
    assert alone["kind"] == "pte"
    assert alone["stored"] == whole["stored"]
    assert {row["name"]: row["offset"] for row in alone["state"]} == {
        row["name"]: row["offset"] for row in whole["state"]
    }


def test_a_saved_program(triptych: Command, tmp_path: Path) -> None:
    from tests.compiler import tiny

    tiny.captured().save_program(tmp_path / "program")
    content = inspected(triptych, tmp_path / "program")
    assert content["kind"] == "program"
    assert len(content["state"]) == 4
    assert {weight["name"]: weight["bytes"] for weight in content["weights"]}["norm.weight"] == 32 * 4


def test_the_text_form_names_what_the_json_names(triptych: Command, demo_eager: Path) -> None:
    outcome = triptych("inspect", demo_eager)
    assert outcome.code == 0, outcome.err
    content = inspected(triptych, demo_eager)
    for name in [*content["methods"], *(row["name"] for row in content["state"])]:
        assert name in outcome.out
    for weight in content["weights"]:
        assert weight["name"] in outcome.out
    assert all(name in outcome.out for name in Manifest.load(demo_eager).files)


@pytest.mark.parametrize("kind", ["missing", "empty folder", "a text file", "a .pte that is none"])
def test_anything_else_is_one_line(triptych: Command, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("model.pte" if ".pte" in kind else "thing")
    if kind == "empty folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("hello")
    outcome = triptych("inspect", path)
    assert outcome.code == 1
    assert str(path) in outcome.error


@pytest.mark.slow
def test_a_truncated_pte_file_is_one_line(triptych: Command, demo_xnnpack: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    shutil.copyfile(demo_xnnpack / "model.pte", path)
    path.write_bytes(path.read_bytes()[:20_000])
    outcome = triptych("inspect", path)
    assert outcome.code == 1
    assert str(path) in outcome.error
