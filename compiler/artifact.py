"""Artifacts: a folder with program files, tokenizer and manifest, that exists whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from triptych.compiler.program import Program, StateRow, Weight
from triptych.compiler.targets.base import Emission, Target
from triptych.errors import ArtifactError
from triptych.manifest import MANIFEST_NAME, FileRecord, Manifest, MethodSignature, WeightRow, sha256_of
from triptych.manifest import StateRow as ManifestStateRow

TOKENIZER_FILE: Final = "tokenizer.json"
STATE_FILE: Final = "state.safetensors"
RECORDED_PACKAGES: Final = ("triptych", "torch", "executorch", "torchao", "transformers")


@dataclass(frozen=True)
class Artifact:
    """A saved artifact: where it lies and what its manifest says."""

    path: Path
    manifest: Manifest


def describe(program: Program, target: Target, *, recipe: str, pipeline: str, has_tokenizer: bool) -> Manifest:
    """Return the manifest of `program` lowered by `target`, without file hashes."""
    metadata = program.metadata
    files = target.program_files(program)
    (owner,) = {file.file for file in files}
    return Manifest(
        programs=files,
        methods={
            name: MethodSignature(tuple(sorted(map(str, method.roles))), method.inputs, method.outputs)
            for name, method in program.methods.items()
        },
        state=tuple(_state_row(row, owner) for row in program.state.values()),
        max_context=metadata.max_context,
        weights=tuple(_weight_row(weight) for weight in program.weights.values()),
        vocab_size=metadata.vocab_size,
        bos_id=metadata.bos_id,
        eos_ids=metadata.eos_ids,
        tokenizer=TOKENIZER_FILE if has_tokenizer else None,
        image=metadata.image,
        chat=metadata.chat,
        target=target.name,
        recipe=recipe,
        pipeline=pipeline,
        versions=dict(_versions()),
        provenance=metadata.provenance,
    )


def _state_row(row: StateRow, owner: str) -> ManifestStateRow:
    return ManifestStateRow(
        row.name,
        row.shape,
        str(row.dtype).removeprefix("torch."),
        row.layout,
        "zeros" if not torch.any(row.initial != 0) else "file",
        owner,
        row.readers,
        row.writers,
    )


def _weight_row(weight: Weight) -> WeightRow:
    tensor = weight.uses[0].tensor
    return WeightRow(
        weight.key,
        str(weight.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        weight.nbytes,
        tuple(name for name in weight.names if name != weight.key),
        weight.users,
    )


def _versions() -> Iterator[tuple[str, str]]:
    for package in RECORDED_PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def check_destination(destination: Path) -> None:
    """Raise `ArtifactError` where `destination` holds something that is no artifact and would be lost."""
    if destination.is_dir():
        if any(destination.iterdir()) and not (destination / MANIFEST_NAME).is_file():
            raise ArtifactError(f"{destination} exists and is no artifact; choose another folder or empty it")
    elif destination.exists():
        raise ArtifactError(f"{destination} exists and is no folder; choose another path")
    parent = next(folder for folder in destination.resolve().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ArtifactError(
            f"cannot write {destination}: {parent} is no folder that can be written; choose another path"
        )


def write(
    destination: Path, emission: Emission, manifest: Manifest, program: Program, tokenizer_file: Path | None
) -> Artifact:
    """Write an artifact at `destination`, replacing an artifact that stands there.

    Everything is written into a hidden folder beside it and renamed at the end; whenever this is interrupted,
    the old artifact or none is left. Raises `ArtifactError` where something else is in the way.
    """
    destination = destination.resolve()
    check_destination(destination)
    with _folder_beside(destination) as folder:
        emission.write(folder)
        stored = {
            row.name: program.state[row.name].initial.contiguous() for row in manifest.state if row.initial == "file"
        }
        if stored:
            save_file(stored, folder / STATE_FILE)
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, folder / TOKENIZER_FILE)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            path.chmod(0o644)
        records = {
            path.relative_to(folder).as_posix(): FileRecord(sha256_of(path), path.stat().st_size) for path in files
        }
        whole = dataclasses.replace(manifest, files=records)
        (folder / MANIFEST_NAME).write_text(whole.to_json(), encoding="utf-8")
    return Artifact(destination, whole)


@contextmanager
def _folder_beside(destination: Path) -> Iterator[Path]:
    """Give a fresh folder that takes `destination`'s place when the block ends, and vanishes when it fails."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    _sweep(destination)
    folder = destination.with_name(f".{destination.name}.new-{os.getpid()}")
    old = destination.with_name(f".{destination.name}.old-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        if destination.exists():
            destination.rename(old)
        folder.rename(destination)
    except BaseException:
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(destination: Path) -> None:
    """Remove what killed exports left beside `destination`; bring back an artifact that was half replaced."""
    for kind in ("old", "new"):
        for left in destination.parent.glob(f".{destination.name}.{kind}-*"):
            pid = left.name.rpartition("-")[2]
            # The own number is a leftover of another process that had it: this one has not begun yet.
            if not pid.isdigit() or (int(pid) != os.getpid() and _is_running(int(pid))):
                continue
            if kind == "old" and not destination.exists():
                left.rename(destination)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
