"""`triptych run`: its output, and each wrong input in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.conftest import Command
from triptych.manifest import Manifest


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), "navy").save(path)
    return path


def test_text_goes_to_standard_output_and_nothing_else(triptych: Command, demo_eager: Path, picture: Path) -> None:
    outcome = triptych("run", demo_eager, "--prompt", "What do you see?", "--image", picture, "--max-new-tokens", 8)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.strip()


def test_json_is_one_object_with_text_tokens_and_timings(triptych: Command, demo_eager: Path, picture: Path) -> None:
    outcome = triptych(
        "run", demo_eager, "--prompt", "What do you see?", "--image", picture, "--max-new-tokens", 5, "--json"
    )
    assert outcome.code == 0, outcome.err
    data = json.loads(outcome.out)
    assert len(outcome.out.strip().splitlines()) == 1
    assert 1 <= len(data["tokens"]) <= 5
    assert isinstance(data["text"], str)
    assert data["prompt_tokens"] > 16, "the picture's placeholders are part of the prompt"
    assert data["finish_reason"]
    assert data["seconds"]
    assert data["decode_tokens_per_second"] is None or data["decode_tokens_per_second"] > 0


def test_json_and_streamed_text_agree(triptych: Command, demo_eager: Path) -> None:
    options = ("--prompt", "Hello.", "--max-new-tokens", 6)
    streamed = triptych("run", demo_eager, *options)
    whole = triptych("run", demo_eager, *options, "--json")
    assert streamed.out.rstrip("\n") == json.loads(whole.out)["text"].rstrip("\n")


def test_a_seed_makes_sampling_repeatable_and_another_seed_may_differ(triptych: Command, demo_eager: Path) -> None:
    def sampled(seed: int) -> list[int]:
        outcome = triptych(
            "run",
            demo_eager,
            "--raw",
            "--prompt",
            "a",
            "--temperature",
            50,
            "--seed",
            seed,
            "--max-new-tokens",
            8,
            "--json",
        )
        tokens: list[int] = json.loads(outcome.out)["tokens"]
        return tokens

    assert sampled(1) == sampled(1)
    assert len({tuple(sampled(seed)) for seed in range(4)}) > 1


def test_a_prompt_past_the_context_is_one_line(triptych: Command, demo_eager: Path) -> None:
    outcome = triptych("run", demo_eager, "--prompt", "a red circle " * 600)
    assert outcome.code == 1
    assert "256" in outcome.error
    assert not outcome.out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.png", None),
        ("text.png", b"no picture at all"),
        ("empty.png", b""),
        ("cut.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00"),
    ],
)
def test_a_file_that_is_no_picture_is_one_line_naming_it(
    triptych: Command, demo_eager: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    outcome = triptych("run", demo_eager, "--prompt", "What is it?", "--image", path)
    assert outcome.code == 1
    assert name in outcome.error
    assert not outcome.out


def test_a_picture_of_100_megapixels_is_one_line(triptych: Command, demo_eager: Path, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    Image.new("1", (20_000, 10_000)).save(path)
    outcome = triptych("run", demo_eager, "--prompt", "What is it?", "--image", path)
    assert outcome.code == 1
    assert "huge.png" in outcome.error


@pytest.mark.slow
def test_a_picture_for_a_text_model_is_one_line(triptych: Command, smollm2_cut_xnnpack: Path, picture: Path) -> None:
    outcome = triptych("run", smollm2_cut_xnnpack, "--prompt", "What is it?", "--image", picture)
    assert outcome.code == 1
    assert "image" in outcome.error
    assert not outcome.out


@pytest.mark.parametrize(
    "options", [("--max-new-tokens", -1), ("--temperature", -0.5), ("--threads", 0)], ids=lambda one: one[0]
)
def test_an_impossible_number_is_one_line(triptych: Command, demo_eager: Path, options: tuple[object, ...]) -> None:
    outcome = triptych("run", demo_eager, "--prompt", "Hello.", *options)
    assert outcome.code != 0
    assert str(options[1]) in outcome.error


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a truncated .pte": lambda folder: _cut(folder / "model.pte"),
    "an empty .pte": lambda folder: (folder / "model.pte").write_bytes(b""),
    "a flipped byte in the .pte": lambda folder: _flip(folder / "model.pte"),
    "no .pte": lambda folder: (folder / "model.pte").unlink(),
    "a truncated manifest": lambda folder: _cut(folder / "triptych.json"),
    "no manifest": lambda folder: (folder / "triptych.json").unlink(),
    "a truncated tokenizer": lambda folder: _cut(folder / "tokenizer.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "inspect", "verify"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_artifact_is_one_line(
    triptych: Command,
    demo_xnnpack: Path,
    demo_checkpoint: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    command: str,
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(demo_xnnpack, folder)
    damage(folder)
    options = {"run": ("--prompt", "Hello."), "verify": ("--against", demo_checkpoint), "inspect": ()}[command]
    outcome = triptych(command, folder, *options)
    assert outcome.code == 1
    assert str(folder) in outcome.error
    assert not outcome.out


@pytest.mark.slow
def test_a_truncated_pte_whose_hash_was_made_to_fit_is_one_line(
    triptych: Command, demo_xnnpack: Path, tmp_path: Path
) -> None:
    import dataclasses

    from triptych.manifest import MANIFEST_NAME, FileRecord, sha256_of

    folder = tmp_path / "artifact"
    shutil.copytree(demo_xnnpack, folder)
    _cut(folder / "model.pte")
    manifest = Manifest.load(folder)
    record = FileRecord(sha256_of(folder / "model.pte"), (folder / "model.pte").stat().st_size)
    files = {**manifest.files, "model.pte": record}
    (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, files=files).to_json())
    outcome = triptych("run", folder, "--prompt", "Hello.")
    assert outcome.code == 1
    assert outcome.error
    assert not outcome.out


@pytest.mark.parametrize("kind", ["missing", "empty", "file"])
def test_what_is_no_artifact_is_one_line(triptych: Command, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "artifact"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("hello")
    outcome = triptych("run", folder, "--prompt", "Hello.")
    assert outcome.code == 1
    assert str(folder) in outcome.error
