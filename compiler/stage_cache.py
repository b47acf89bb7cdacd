"""A cache of captured programs on disk, so that an export that was run before goes on where it first differs.

::

    CACHEDIR.TAG           marks the folder as a cache
    entries/KEY/           a program after one step: graphs and tables (`triptych.compiler.storage`), with locations
        entry.json         which blob is which storage, the results of the passes so far, the operators it calls
        checksums.json     the hash of every file the entry needs
    blobs/HASH             the bytes of a storage, which entries share

Keys are those of `triptych.compiler.stage_keys`. An entry that is damaged is thrown away and made again. Processes
that use one cache at the same time wait for each other.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from triptych.compiler import storage
from triptych.compiler.custom_operators import MissingOperatorError, custom_operators, require_operator
from triptych.compiler.editing import storage_identity
from triptych.compiler.folders import folder_beside
from triptych.compiler.manager import PassResult
from triptych.compiler.pass_kinds import Match, Refusal
from triptych.compiler.pipeline import CAPTURE, Pipeline
from triptych.compiler.program import Program
from triptych.compiler.stage_keys import digest, step_keys, storage_bytes
from triptych.compiler.stages import Captured, Report, Source
from triptych.compiler.text import program_text
from triptych.errors import UsageError

DEFAULT_MAX_BYTES: Final = 4 * 2**30
ENTRY_FILE: Final = "entry.json"
CHECKSUMS_FILE: Final = "checksums.json"
TAG_FILE: Final = "CACHEDIR.TAG"
# The signature that backup programs know (https://bford.info/cachedir/).
TAG: Final = "Signature: 8a477f597d28d172789f06886806bc55\n# Stages of exports by triptych. It may be deleted.\n"

Hashes = dict[int, tuple[str, Tensor]]
"""Identity of a storage → its hash, beside a tensor that keeps it, so that no other can take its identity."""


@dataclass(frozen=True)
class Stage:
    """A program after some step of a pipeline, and the results of all its passes up to there."""

    program: Program
    results: tuple[PassResult, ...]


class _DamageError(Exception):
    """An entry is not what was written; `blobs` are the blobs at fault."""

    def __init__(self, message: str, blobs: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.blobs = tuple(blobs)


class _TooLargeError(Exception):
    """An entry is larger than the whole cache may be."""


def run(source: Source, pipeline: Pipeline, cache: StageCache | None) -> Captured:
    """Run a whole pipeline: source passes, capture, graph and program passes, from the last stage that is cached.

    What had to run is stored, step by step. With instruments on `source` only the capture is taken from the cache,
    so that they see every pass. Raises what the stages raise; trouble with the cache is reported and worked around.
    """
    (source.pipeline + pipeline).checked()
    if cache is None:
        return source.transform(pipeline.source).capture().rewrite(pipeline.program)
    keys = step_keys(source.model, source.pipeline, pipeline, source.report)
    steps = [CAPTURE, *(one.name for one in pipeline.program)]
    transformed = source.transform(pipeline.source) if source.instruments else None
    done, stage = _last_cached(cache, keys[:1] if source.instruments else keys, steps, source.report)
    hashes: Hashes = {}

    def store(captured: Captured, index: int) -> None:
        if index < len(keys):
            results = captured.results[len(source.results) :]
            cache.store(keys[index], steps[index], Stage(captured.program, results), hashes, source.report)

    if stage is None:
        captured = (transformed or source.transform(pipeline.source)).capture()
        store(captured, 0)
    else:
        captured = Captured(
            stage.program,
            source.model.tokenizer_file,
            source.pipeline + Pipeline(pipeline.source, captures=True, program=pipeline.program[:done]),
            transformed.results if transformed else (*source.results, *stage.results),
            source.report,
            source.instruments,
        )
        for step in steps[: done + 1]:
            source.report(f"{step} (cached)")
    for index, one in enumerate(pipeline.program[done:], start=done + 1):
        captured = captured.rewrite(one)
        store(captured, index)
    return captured


def _last_cached(
    cache: StageCache, keys: Sequence[str], steps: Sequence[str], report: Report
) -> tuple[int, Stage | None]:
    """Return how many passes after capture the cache knows the outcome of, and that outcome."""
    for index in reversed(range(len(keys))):
        stage = cache.load(keys[index], steps[index], report)
        if stage is not None:
            return index, stage
    return 0, None


class StageCache:
    """Stages in `folder`, the least recently used of which go when they take more than `max_bytes` together.

    The folder is made when the first stage is stored. Raises `UsageError` for a folder that holds something else.
    """

    def __init__(self, folder: str | Path, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.folder = Path(folder).resolve()
        self.max_bytes = max_bytes
        self._tag = self.folder / TAG_FILE
        self._entries = self.folder / "entries"
        self._blobs = self.folder / "blobs"
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"the cache {self.folder} is no folder; choose another path")
        if self.folder.is_dir() and not self._tag.is_file() and any(self.folder.iterdir()):
            raise UsageError(f"{self.folder} is not empty and no cache of stages; choose another folder for the cache")

    # ---------------------------------------------------------------------------------------------------- reading

    def load(self, key: str, step: str, report: Report) -> Stage | None:
        """Return the stage stored under `key`, or None; a damaged one is thrown away, and `report` hears of it."""
        if not self._tag.is_file():
            return None
        entry = self._entries / key
        try:
            with self._locked(fcntl.LOCK_SH):
                if not entry.is_dir():
                    return None
                stage = self._read(entry)
                with suppress(OSError):
                    os.utime(entry)
                return stage
        except MissingOperatorError as error:
            report(f"cache entry {key[:12]} ({step}) is not used: {error}")
        except Exception as error:  # noqa: BLE001 (whatever damaged bytes lead torch to raise: the stage is made again)
            report(f"cache entry {key[:12]} ({step}) is damaged; rebuilding")
            self._throw_away(entry, error.blobs if isinstance(error, _DamageError) else ())
        return None

    def _read(self, entry: Path) -> Stage:
        checksums = json.loads((entry / CHECKSUMS_FILE).read_bytes())
        for name, expected in checksums["files"].items():
            if digest((entry / name).read_bytes()) != expected:
                raise _DamageError(f"{name} does not have its checksum")
        data = json.loads((entry / ENTRY_FILE).read_bytes())
        for operator in data["operators"]:
            require_operator(operator)
        storages = {name: self._read_blob(blob, checksums["blobs"][blob]) for name, blob in data["storages"].items()}
        damaged = [data["storages"][name] for name, tensor in storages.items() if tensor is None]
        if damaged:
            raise _DamageError("a blob does not have its checksum", damaged)
        program = storage.read_graphs(entry, {name: tensor for name, tensor in storages.items() if tensor is not None})
        if digest(program_text(program).encode()) != data["text"]:
            raise _DamageError("the program does not come back as it was")
        return Stage(program, tuple(map(_result, data["results"])))

    def _read_blob(self, name: str, size: int) -> Tensor | None:
        """Map a blob into memory, privately: state rows of equal bytes are one blob and must not share a storage."""
        path = self._blobs / name
        if not path.is_file() or path.stat().st_size != size:
            return None
        mapped: Any = torch.UntypedStorage.from_file(str(path), False, size) if size else torch.UntypedStorage()
        tensor = torch.empty(0, dtype=torch.uint8).set_(mapped)
        return tensor if digest(storage_bytes(tensor)) == name else None

    def _throw_away(self, entry: Path, blobs: Sequence[str]) -> None:
        with suppress(OSError), self._locked(fcntl.LOCK_EX):
            shutil.rmtree(entry, ignore_errors=True)
            for blob in blobs:
                (self._blobs / blob).unlink(missing_ok=True)

    # ---------------------------------------------------------------------------------------------------- writing

    def store(self, key: str, step: str, stage: Stage, hashes: Hashes, report: Report) -> None:
        """Store a stage, unless it is there or larger than the cache; where that fails, `report` hears why.

        `hashes` remembers the hashes of storages between the calls for one export.
        """
        entry = self._entries / key
        try:
            self._prepare()
            with self._locked(fcntl.LOCK_EX):
                if entry.is_dir():
                    os.utime(entry)
                    return
                with folder_beside(entry) as fresh:
                    self._write(fresh, stage, hashes)
                self._shrink()
        except Exception as error:  # noqa: BLE001 (no export fails for its cache, whatever torch cannot write)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            report(f"{step} is not cached: {reason}")

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._tag.is_file():
            self._tag.write_text(TAG, encoding="utf-8")
        self._entries.mkdir(exist_ok=True)
        self._blobs.mkdir(exist_ok=True)

    def _write(self, folder: Path, stage: Stage, hashes: Hashes) -> None:
        storages = storage.write_graphs(stage.program, folder, locations=True)
        blobs = {name: _hash(tensor, hashes) for name, tensor in storages.items()}
        data = {
            "storages": blobs,
            "operators": sorted(custom_operators(stage.program)),
            "text": digest(program_text(stage.program).encode()),
            "results": [asdict(result) for result in stage.results],
        }
        (folder / ENTRY_FILE).write_text(json.dumps(data) + "\n", encoding="utf-8")
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        sizes = {blob: len(storage_bytes(storages[name])) for name, blob in blobs.items()}
        checksums = {
            "files": {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in files},
            "blobs": sizes,
        }
        (folder / CHECKSUMS_FILE).write_text(json.dumps(checksums) + "\n", encoding="utf-8")
        needed = _size(folder) + sum(sizes.values())
        if needed > self.max_bytes:
            raise _TooLargeError(f"it takes {needed:,} bytes, the cache holds {self.max_bytes:,}")
        for name, blob in blobs.items():
            path = self._blobs / blob
            if not path.is_file() or path.stat().st_size != sizes[blob]:
                fresh = path.with_name(f".{blob}")
                fresh.write_bytes(storage_bytes(storages[name]))
                fresh.replace(path)

    def _shrink(self) -> None:
        """Remove the least recently used entries that do not fit, blobs that no entry needs, and what was left over."""
        needed: dict[str, int] = {}
        used = 0
        for entry in sorted(self._entries.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True):
            blobs = _blobs_of(entry)
            if blobs is not None:
                used += _size(entry) + sum(size for blob, size in blobs.items() if blob not in needed)
            if blobs is None or used > self.max_bytes:
                shutil.rmtree(entry, ignore_errors=True)
            else:
                needed |= blobs
        for path in self._blobs.iterdir():
            if path.name not in needed:
                path.unlink()

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        """Hold the cache for reading (``LOCK_SH``) or alone (``LOCK_EX``)."""
        with self._tag.open("rb") as file:
            fcntl.flock(file, kind)
            yield


def _blobs_of(entry: Path) -> dict[str, int] | None:
    """Return the blobs that an entry needs with their sizes, None for what is no whole entry."""
    try:
        blobs: dict[str, int] = dict(json.loads((entry / CHECKSUMS_FILE).read_bytes())["blobs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A folder that was not renamed in the end is what a killed process left.
    return None if entry.name.startswith(".") else blobs


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _hash(tensor: Tensor, hashes: Hashes) -> str:
    identity = storage_identity(tensor)
    if identity not in hashes:
        hashes[identity] = digest(storage_bytes(tensor)), tensor
    return hashes[identity][0]


def _result(data: Mapping[str, Any]) -> PassResult:
    matches = tuple(Match(**match) for match in data["matches"])
    refusals = tuple(Refusal(**refusal) for refusal in data["refusals"])
    return PassResult(**{**data, "matches": matches, "refusals": refusals})
