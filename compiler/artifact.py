"""Artifacts: a folder with program files, tokenizer and manifest, that exists whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from triptych.compiler.folders import check_replaceable, folder_beside
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
        versions=dict(package_versions()),
        provenance=metadata.provenance,
        abi=metadata.abi,
        kept_tokens=metadata.kept_tokens,
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


def package_versions() -> Iterator[tuple[str, str]]:
    """Yield the packages that shape an artifact, each with its version, where installed."""
    for package in RECORDED_PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def check_destination(destination: Path) -> None:
    """Raise `ArtifactError` where `destination` holds something that is no artifact and would be lost."""
    check_replaceable(destination, MANIFEST_NAME, "artifact")
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
    with folder_beside(destination) as folder:
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
