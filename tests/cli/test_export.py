"""`triptych export`: what it makes, what it refuses in one line, and what an interruption leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Command
from triptych.manifest import Manifest


def test_it_makes_the_artifact_and_says_where(triptych: Command, demo_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    outcome = triptych("export", demo_checkpoint, "--out", out, "--target", "eager", "--max-context", 64)
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith(f"{out} (eager, fp32, ")
    manifest = Manifest.load(out)
    manifest.check_files(out)
    assert manifest.max_context == 64
    assert [line for line in outcome.err.splitlines() if line.startswith("capture prefill: ")], "stages are shown"


def test_a_pipeline_of_ones_own_is_what_the_manifest_tells(
    triptych: Command, demo_checkpoint: Path, tmp_path: Path
) -> None:
    text = "static-kv-cache{max=48},capture,last-token-logits"
    outcome = triptych("export", demo_checkpoint, "--out", tmp_path / "a", "--target", "eager", "--pipeline", text)
    assert outcome.code == 0, outcome.err
    manifest = Manifest.load(tmp_path / "a")
    assert (manifest.pipeline, manifest.max_context) == (text, 48)


WRONG_OPTIONS: dict[str, tuple[list[object], str]] = {
    "target": (["--target", "moon"], "no target is called 'moon'; known: "),
    "recipe": (["--recipe", "2bit"], "no recipe is called '2bit'; known: fp32, 8da4w"),
    "recipe for the target": (["--target", "portable", "--recipe", "8da4w"], "portable cannot lower recipe 8da4w"),
    "contract": (["--abi", "other"], "no ABI is called 'other'"),
    "pass": (["--pipeline", "static-kv-cach,capture"], "no pass is called 'static-kv-cach'"),
    "pipeline syntax": (["--pipeline", "static-kv-cache{max=2,capture"], "column 16"),
    "pipeline option": (["--pipeline", "static-kv-cache{size=2},capture"], "has no option 'size'"),
    "pipeline without an option": (["--pipeline", "quantize,capture"], "recipe"),
    "pipeline order": (["--pipeline", "swap-sdpa,static-kv-cache,capture"], "must come after"),
    "pipeline without capture": (["--pipeline", "static-kv-cache"], "has no 'capture'"),
    "context of zero": (["--max-context", 0], "max context is 0"),
    "negative context": (["--max-context", -5], "max context is -5"),
    "context past the model's": (["--max-context", 100_000], "allows 1 to 512 positions"),
    "context past the model's in the pipeline": (
        ["--target", "eager", "--pipeline", "static-kv-cache{max=100000},capture"],
        "the model allows 1 to 512",
    ),
}


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS.values(), ids=WRONG_OPTIONS.keys())
def test_a_wrong_option_is_one_line_and_leaves_nothing(
    triptych: Command, demo_checkpoint: Path, tmp_path: Path, options: list[object], message: str
) -> None:
    outcome = triptych("export", demo_checkpoint, "--out", tmp_path / "artifact", *options)
    assert outcome.code != 0
    assert message in outcome.error
    assert not outcome.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("context", [1, 2])
def test_a_context_of_one_or_two_either_works_or_is_refused_in_one_line(
    triptych: Command, demo_checkpoint: Path, tmp_path: Path, context: int
) -> None:
    out = tmp_path / "artifact"
    outcome = triptych("export", demo_checkpoint, "--out", out, "--target", "eager", "--max-context", context)
    if outcome.code == 0:
        assert Manifest.load(out).max_context == context
    else:
        assert "context" in outcome.error
        assert not list(tmp_path.iterdir())


def _broken(checkpoint: Path, folder: Path, kind: str) -> Path:
    """Return something that is no whole model."""
    if kind == "missing":
        return folder / "nowhere"
    copy = folder / "model"
    if kind == "no model":
        copy.mkdir()
        (copy / "notes.txt").write_text("hello")
        return copy
    if kind == "a file":
        copy.write_text("hello")
        return copy
    shutil.copytree(checkpoint, copy)
    weights = copy / "model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "half the weights":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif kind == "broken config":
        (copy / "config.json").write_text("{")
    elif kind == "unknown model type":
        (copy / "config.json").write_text(json.dumps({"model_type": "unheard-of"}))
    elif kind == "broken tokenizer":
        (copy / "tokenizer.json").write_text("{")
    elif kind == "no processor":
        (copy / "processor_config.json").unlink()
    return copy


@pytest.mark.parametrize(
    "kind",
    [
        "missing", "no model", "a file", "no weights", "half the weights", "broken config", "unknown model type",
        "broken tokenizer", "no processor",
    ],
)  # fmt: skip
def test_what_is_no_model_is_one_line_naming_it(
    triptych: Command, demo_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    model = _broken(demo_checkpoint, tmp_path, kind)
    before = sorted(tmp_path.rglob("*"))
    outcome = triptych("export", model, "--out", tmp_path / "artifact", "--target", "eager", "--max-context", 32)
    assert outcome.code == 1
    assert str(model) in outcome.error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_in_the_way_is_refused_before_the_model_is_loaded(
    triptych: Command, demo_checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    outcome = triptych("export", demo_checkpoint, "--out", tmp_path, "--target", "eager")
    assert outcome.code == 1
    assert "is no artifact; choose another folder" in outcome.error
    assert "load model" not in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def _interrupted(checkpoint: Path, out: Path, target: str, stage: str) -> tuple[int, str]:
    """Send Ctrl-C when the stage before `stage` is done; return exit code and standard error."""
    # A shell that runs the tests in the background hands down an ignored SIGINT; a user's terminal does not.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listen}; from triptych.cli import main; main()", "export"]
    options = [str(checkpoint), "--out", str(out), "--target", target, "--max-context", "64"]
    heard = ""
    process: Any = subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    with process:
        for line in process.stderr:
            heard += line
            if line.startswith(f"{stage}: "):
                process.send_signal(signal.SIGINT)
                break
        heard += process.stderr.read()
        return process.wait(timeout=120), heard


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "stage"), [("eager", "load model"), ("eager", "capture prefill"), ("xnnpack", "partition")]
)
def test_ctrl_c_ends_with_130_and_leaves_nothing(
    demo_checkpoint: Path, tmp_path: Path, target: str, stage: str
) -> None:
    code, heard = _interrupted(demo_checkpoint, tmp_path / "artifact", target, stage)
    assert code == 130, heard
    assert heard.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in heard
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_leaves_the_old_artifact(demo_checkpoint: Path, demo_eager: Path, tmp_path: Path) -> None:
    old = tmp_path / "artifact"
    shutil.copytree(demo_eager, old)
    code, _ = _interrupted(demo_checkpoint, old, "eager", "capture token_embedding")
    assert code == 130
    assert Manifest.load(old) == Manifest.load(demo_eager)
    Manifest.load(old).check_files(old)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
