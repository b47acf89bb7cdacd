"""`triptych verify`: exit 0 within the tolerance, 3 beyond it, and 1 or 2 where nothing could be compared."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Command

pytestmark = pytest.mark.slow


def scaled(checkpoint: Path, folder: Path, name: str, factor: float) -> Path:
    """Return a copy of the checkpoint with one weight scaled."""
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    (key,) = [key for key in weights if key.endswith(name)]
    weights[key] = weights[key] * factor
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_checkpoint_it_was_made_from_is_parity(triptych: Command, demo_eager: Path, demo_checkpoint: Path) -> None:
    outcome = triptych("verify", demo_eager, "--against", demo_checkpoint, "--tokens", 3)
    assert outcome.code == 0, outcome.out + outcome.err
    assert outcome.out.splitlines()[-1] == "parity"
    assert "FAIL" not in outcome.out


@pytest.mark.parametrize(
    "name", ["layers.2.mlp.down_proj.weight", "layers.1.self_attn.k_proj.weight"], ids=["feed-forward", "keys"]
)
def test_one_scaled_layer_of_the_decoder_is_exit_3(
    triptych: Command, demo_eager: Path, demo_checkpoint: Path, tmp_path: Path, name: str
) -> None:
    other = scaled(demo_checkpoint, tmp_path / "model", f"language_model.model.{name}", 1.5)
    outcome = triptych("verify", demo_eager, "--against", other, "--tokens", 2)
    assert outcome.code == 3
    assert outcome.out.splitlines()[-1] == "NO parity"
    assert "FAIL text, prompt of 17" in outcome.out


def test_one_scaled_layer_of_the_vision_tower_is_exit_3_by_the_image_traces_alone(
    triptych: Command, demo_eager: Path, demo_checkpoint: Path, tmp_path: Path
) -> None:
    other = scaled(demo_checkpoint, tmp_path / "model", "linear_2.weight", 1.01)
    outcome = triptych("verify", demo_eager, "--against", other, "--tokens", 2, "--json")
    assert outcome.code == 3
    failed = {trace["trace"] for trace in json.loads(outcome.out)["traces"] if not trace["passed"]}
    assert failed == {"one image", "two images", "image in a later turn"}


def test_json_is_one_object_that_counts_what_was_compared(
    triptych: Command, demo_eager: Path, demo_checkpoint: Path
) -> None:
    outcome = triptych("verify", demo_eager, "--against", demo_checkpoint, "--tokens", 2, "--json")
    data = json.loads(outcome.out)
    assert (outcome.code, data["passed"], data["recipe"], data["target"]) == (0, True, "fp32", "eager")
    for trace in data["traces"]:
        assert trace["compared_outputs"] >= 3
        assert trace["compared_state_rows"] == 2 * 4
        assert trace["worst_relative"] < 1e-4


def test_a_bound_on_kl_that_quantization_breaks_is_exit_3(
    triptych: Command, demo_quantized_eager: Path, demo_checkpoint: Path
) -> None:
    options = ("--against", demo_checkpoint, "--tokens", 2, "--max-kl", 1e-12)
    assert triptych("verify", demo_quantized_eager, *options).code == 3


def test_a_model_of_another_kind_is_one_line(triptych: Command, demo_eager: Path, smollm2_cut: Path) -> None:
    outcome = triptych("verify", demo_eager, "--against", smollm2_cut)
    assert outcome.code in (1, 2)
    assert "vocabulary" in outcome.error


def test_too_many_tokens_are_one_line(triptych: Command, demo_eager: Path, demo_checkpoint: Path) -> None:
    outcome = triptych("verify", demo_eager, "--against", demo_checkpoint, "--tokens", 1000)
    assert outcome.code == 2
    assert "do not fit the context of 256" in outcome.error


def test_a_missing_model_is_one_line(triptych: Command, demo_eager: Path, tmp_path: Path) -> None:
    outcome = triptych("verify", demo_eager, "--against", tmp_path / "nowhere")
    assert outcome.code == 1
    assert "nowhere" in outcome.error
