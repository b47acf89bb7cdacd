"""Artifacts exist whole or not at all, hash every file, and are equal for equal inputs."""

import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler import tiny
from triptych.compiler import artifact
from triptych.compiler.stages import Lowered
from triptych.errors import ArtifactError
from triptych.manifest import MANIFEST_NAME, Manifest

ROOT = Path(__file__).parent.parent.parent

EXPORT = """
import sys
import tests.conftest
from tests.compiler import tiny
lowered = tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits").lower(sys.argv[2])
lowered.save(sys.argv[1])
"""
EXPORT_AND_HANG = """
import sys, time
import tests.conftest
from tests.compiler import tiny
lowered = tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits").lower("eager")
write = type(lowered.emission).write
def hang(emission, folder):
    write(emission, folder)
    print("written", flush=True)
    time.sleep(60)
type(lowered.emission).write = hang
lowered.save(sys.argv[1])
"""


class Failing:
    """An emission that fails with the work half done."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def write(self, folder: Path) -> None:
        (folder / "model.pte").write_bytes(b"half")
        raise self.error


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    return tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits").lower("eager")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(code: str, *arguments: object, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ------------------------------------------------------------------------------------------------ manifest and files


def test_the_manifest_reads_back_as_it_was(lowered: Lowered, tmp_path: Path) -> None:
    saved = lowered.save(tmp_path / "artifact")
    assert Manifest.load(saved.path) == saved.manifest
    assert Manifest.from_json(saved.manifest.to_json()) == saved.manifest


def test_an_image_models_manifest_reads_back_too(demo_eager: Path) -> None:
    manifest = Manifest.load(demo_eager)
    assert manifest.image is not None
    assert manifest.chat.template
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_the_manifest_says_what_the_program_is(lowered: Lowered, tmp_path: Path) -> None:
    manifest = lowered.save(tmp_path / "artifact").manifest
    assert list(manifest.methods) == ["token_embedding", "prefill", "decode"]
    assert (manifest.max_context, manifest.vocab_size, manifest.eos_ids) == (24, 48, (1,))
    assert (manifest.target, manifest.recipe) == ("eager", "fp32")
    assert manifest.pipeline == "static-kv-cache,swap-sdpa,capture,last-token-logits"
    assert {row.owner for row in manifest.state} == {manifest.programs[0].file}
    assert manifest.versions["torch"] == torch.__version__.partition("+")[0] or manifest.versions["torch"]


def test_every_file_is_hashed_with_its_size(lowered: Lowered, tmp_path: Path) -> None:
    saved = lowered.save(tmp_path / "artifact")
    files = content(saved.path)
    del files[MANIFEST_NAME]
    assert {name: (record.sha256, record.bytes) for name, record in saved.manifest.files.items()} == {
        name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in files.items()
    }


def test_one_changed_byte_is_found(lowered: Lowered, tmp_path: Path) -> None:
    saved = lowered.save(tmp_path / "artifact")
    path = saved.path / "eager" / "storages.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"storages\.safetensors does not have the sha256"):
        saved.manifest.check_files(saved.path)


def test_a_tokenizer_travels_along(tmp_path: Path) -> None:
    file = tmp_path / "tok.json"
    file.write_text("{}")
    model = dataclasses.replace(tiny.tiny(layers=1), tokenizer_file=file)
    saved = tiny.captured(model).lower("eager").save(tmp_path / "artifact")
    assert saved.manifest.tokenizer == "tokenizer.json"
    assert (saved.path / "tokenizer.json").read_text() == "{}"


def test_state_that_does_not_start_at_zero_is_stored(tmp_path: Path) -> None:
    from triptych.compiler.stages import Source
    from triptych.runtime.loaders import load_runner

    source = Source(tiny.tiny(layers=1)).transform("static-kv-cache")
    source.model.module.get_buffer("blocks.0.attention.routed_attention.cache.keys")[0, 0] = 3
    saved = source.capture().lower("eager").save(tmp_path / "artifact")
    assert [row.initial for row in saved.manifest.state] == ["file", "zeros"]
    with load_runner(saved.path, saved.manifest) as runner:
        row = runner.state["blocks.0.attention.routed_attention.cache.keys"]
        row.zero_()
        runner.reset_state()
        assert (row[0, 0] == 3).all()
        assert not row[0, 1:].any()


# ------------------------------------------------------------------------------------------------ replacing


def test_a_folder_that_is_no_artifact_is_never_replaced(lowered: Lowered, tmp_path: Path) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"irreplaceable")
    with pytest.raises(ArtifactError, match="exists and is no artifact"):
        lowered.save(folder)
    assert content(folder) == {"photo.jpg": b"irreplaceable"}


def test_a_file_in_the_way_is_never_replaced(lowered: Lowered, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.write_text("mine")
    with pytest.raises(ArtifactError, match="exists and is no folder"):
        lowered.save(path)
    assert path.read_text() == "mine"


def test_an_empty_folder_is_filled(lowered: Lowered, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    assert (lowered.save(tmp_path / "artifact").path / MANIFEST_NAME).is_file()


def test_an_artifact_is_replaced_whole(lowered: Lowered, tmp_path: Path) -> None:
    saved = lowered.save(tmp_path / "artifact")
    (saved.path / "leftover.bin").write_bytes(b"of the old one")
    lowered.save(tmp_path / "artifact")
    assert "leftover.bin" not in content(saved.path)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("before", [True, False], ids=["over an artifact", "in a new place"])
def test_a_failed_write_leaves_the_old_artifact_or_none(
    lowered: Lowered, tmp_path: Path, error: BaseException, before: bool
) -> None:
    folder = tmp_path / "artifact"
    old = content(lowered.save(folder).path) if before else {}
    broken = dataclasses.replace(lowered, emission=Failing(error))
    with pytest.raises(type(error)):
        broken.save(folder)
    assert folder.exists() == before
    assert content(folder) == old
    assert [path.name for path in tmp_path.iterdir()] == (["artifact"] if before else [])


def test_a_failed_rename_brings_the_old_artifact_back(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "artifact"
    old = content(lowered.save(folder).path)
    rename = Path.rename

    def failing(path: Path, target: Any) -> Path:
        if ".new-" in path.name:
            raise OSError("no rename today")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no rename today"):
        lowered.save(folder)
    assert content(folder) == old
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["over an artifact", "in a new place"])
def test_a_killed_export_leaves_the_old_artifact_or_none_and_the_next_one_sweeps(
    lowered: Lowered, tmp_path: Path, before: bool
) -> None:
    folder = tmp_path / "artifact"
    old = content(lowered.save(folder).path) if before else {}
    with start(EXPORT_AND_HANG, folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        assert len(list(tmp_path.iterdir())) == 1 + before, "it was writing beside its destination"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert folder.exists() == before
    assert content(folder) == old
    lowered.save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    Manifest.load(folder).check_files(folder)


def test_what_a_running_export_writes_is_not_swept(lowered: Lowered, tmp_path: Path) -> None:
    running = tmp_path / f".artifact.new-{os.getppid()}"
    running.mkdir()
    lowered.save(tmp_path / "artifact")
    assert running.is_dir()


def test_an_artifact_that_was_half_replaced_comes_back(lowered: Lowered, tmp_path: Path) -> None:
    """Killed between its two renames, an export leaves the old artifact under its hidden name."""
    saved = lowered.save(tmp_path / "artifact")
    old = content(saved.path)
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        gone.wait()
    saved.path.rename(tmp_path / f".artifact.old-{gone.pid}")
    broken = dataclasses.replace(lowered, emission=Failing(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        broken.save(saved.path)
    assert content(saved.path) == old
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


# ------------------------------------------------------------------------------------------------ equal bytes


@pytest.mark.slow
@pytest.mark.parametrize("target", ["eager", "xnnpack"])
def test_equal_inputs_give_equal_bytes(tmp_path: Path, target: str) -> None:
    """Here and in another process, which has another hash seed and another destination."""
    here = tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits").lower(target).save(tmp_path / "here")
    there = tmp_path / "elsewhere" / "there"
    with start(EXPORT, there, target, PYTHONHASHSEED="17") as process:
        _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    one, other = content(here.path), content(there)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_no_path_of_this_machine_is_in_an_artifact(lowered: Lowered, tmp_path: Path) -> None:
    files = content(lowered.save(tmp_path / "artifact").path)
    places = [str(ROOT).encode(), str(tmp_path).encode(), str(Path.home()).encode()]
    assert [name for name, data in files.items() if any(place in data for place in places)] == []


def test_the_state_rows_of_the_manifest_are_those_of_the_program(lowered: Lowered) -> None:
    rows = {row.name: (row.shape, row.readers, row.writers) for row in lowered.manifest.state}
    assert rows == {row.name: (row.shape, row.readers, row.writers) for row in lowered.program.state.values()}
    assert artifact.TOKENIZER_FILE == "tokenizer.json"
