"""The manifest of an artifact: what the compiler writes and the runtime reads.

An artifact is a folder with program files, this manifest as ``triptych.json`` and the tokenizer. The module
uses the standard library only, so that either half can be installed and imported without the other. The
JSON form is published as ``manifest.schema.json`` beside this file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from triptych.errors import ArtifactError

MANIFEST_NAME: Final = "triptych.json"
FORMAT: Final = "triptych-artifact"
FORMAT_VERSION: Final = 1
ABI: Final = "triptych/1"
EXECUTORCH_LLM_ABI: Final = "executorch-llm/1"
CHOSEN_TOKEN: Final = "token"
"""The output of a decode method that chooses the most likely token itself, int64 [1, 1], in place of "logits"."""


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that may differ from call to call: `minimum` ≤ size ≤ `maximum`.

    Dimensions of one method with the same name have the same size in one call.
    """

    name: str
    minimum: int
    maximum: int


Dim = int | DynamicDim


@dataclass(frozen=True)
class TensorSignature:
    """One named input or output of a method.

    `dtype` is torch's name without the prefix ("float32"). `links` says for an input where its value comes
    from and for an output who takes it: "tokens", "position", "image", "sampler" outside the program, or
    "method.port" inside it.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class MethodSignature:
    """What a method takes and gives; `roles` such as "prefill" or "encoder(image)"."""

    roles: tuple[str, ...]
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]

    def input(self, name: str) -> TensorSignature:
        """Return the input called `name`; raises `ArtifactError` where there is none."""
        for port in self.inputs:
            if port.name == name:
                return port
        known = ", ".join(port.name for port in self.inputs)
        raise ArtifactError(f"no input {name!r}; the method takes {known}")


@dataclass(frozen=True)
class ProgramFile:
    """One program file, the engine that runs it and the methods it holds."""

    file: str
    engine: str
    methods: tuple[str, ...]


@dataclass(frozen=True)
class StateRow:
    """One mutable buffer that lives across calls.

    `layout` names the axes ("BSHD" for a KV row: batch, slot, head, head dimension). `initial` is "zeros" or
    "file", where the values stand under the row's name in ``state.safetensors``. `owner` is the program file
    whose engine allocates the row; the other engines are handed its tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    initial: str
    owner: str
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class WeightRow:
    """One stored weight of the program: its name, its other names (tied weights), and the methods that use it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    aliases: tuple[str, ...]
    users: tuple[str, ...]


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes `pixel_values`, in this order; None leaves a step out.

    `resize` is (height, width), or (shortest_edge,); `resample` is Pillow's filter number; `crop` is (height,
    width), cut from the centre; `rescale` multiplies the 0 to 255 values; `mean` and `std` normalize each of
    the RGB channels. `tokens` embeddings stand for one image, at each placeholder `token` with id `token_id`, or none
    where the encoder writes state instead; `prefix` and `suffix` are token ids the model expects around them.
    """

    token: str
    token_id: int
    tokens: int
    resize: tuple[int, ...] | None
    resample: int
    crop: tuple[int, int] | None
    rescale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


@dataclass(frozen=True)
class ChatSettings:
    """The Jinja chat template and the special tokens it may name; no template means plain prompts."""

    template: str | None
    bos_token: str | None = None
    eos_token: str | None = None


@dataclass(frozen=True)
class FileRecord:
    """Hash and size of one file of the artifact."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Everything the runtime needs to know of an artifact. Raises nothing itself; see `from_json`.

    `kept_tokens` are the ids that the program can take and give (see `token_ids`), None for the whole vocabulary.
    """

    programs: tuple[ProgramFile, ...]
    methods: Mapping[str, MethodSignature]
    state: tuple[StateRow, ...]
    max_context: int
    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]
    tokenizer: str | None
    image: ImageSettings | None
    chat: ChatSettings
    target: str
    recipe: str
    pipeline: str
    weights: tuple[WeightRow, ...] = ()
    cpu_features: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    abi: str = ABI
    kept_tokens: str | None = None

    def method_with_role(self, role: str) -> str | None:
        """Return the name of the one method that has `role`, or None."""
        return next((name for name, method in self.methods.items() if role in method.roles), None)

    def without_hashes(self) -> Manifest:
        """Return the copy that a program file itself can carry: a file cannot hold its own hash."""
        return dataclasses.replace(self, files={})

    def to_json(self) -> str:
        """Return stable JSON text: sorted keys, two spaces, a final newline."""
        data = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        if self.kept_tokens is None:  # releases that do not know of it read what does not need it
            del data["kept_tokens"]
        return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = MANIFEST_NAME) -> Manifest:
        """Parse JSON text; raises `ArtifactError` naming `where` on anything that is not a manifest."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{where} is no JSON: {error}; export the model again") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArtifactError(f"{where} is no Triptych manifest: 'format' is not {FORMAT!r}; export the model again")
        if data.get("version") != FORMAT_VERSION:
            raise ArtifactError(
                f"{where} has manifest version {data.get('version')!r}; this release reads {FORMAT_VERSION}: "
                "export the model again"
            )
        try:
            return _manifest(data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{where} is damaged: {type(error).__name__} {error}; export the model again"
            ) from error

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of the artifact in `folder`; raises `ArtifactError`."""
        if not folder.is_dir():
            raise ArtifactError(f"no artifact at {folder}: the folder does not exist; check the path")
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise ArtifactError(f"{folder} is no artifact: it has no {MANIFEST_NAME}; make one with `triptych export`")
        return cls.from_json(path.read_text(encoding="utf-8", errors="replace"), where=str(path))

    def check_files(self, folder: Path) -> None:
        """Compare every file's size and sha256 with the record; raises `ArtifactError` at the first difference."""
        for name, record in self.files.items():
            path = folder / name
            if not path.is_file():
                raise ArtifactError(f"{folder} lacks {name}, which its manifest lists; export the model again")
            size = path.stat().st_size
            if size != record.bytes:
                raise ArtifactError(
                    f"{path} has {size} bytes, its manifest says {record.bytes}; export the model again"
                )
            if sha256_of(path) != record.sha256:
                raise ArtifactError(f"{path} does not have the sha256 its manifest states; export the model again")


def token_ids(text: str) -> list[int]:
    """Return the ids that a text such as "0-255,300" stands for; raises `ValueError` for any other text."""
    ids: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        ids += range(int(first), int(last or first) + 1)
    return ids


def token_text(ids: Iterable[int]) -> str:
    """Return the text that `token_ids` reads: the ids in order, consecutive ones as a range."""
    ranges: list[list[int]] = []
    for one in sorted(set(ids)):
        if ranges and ranges[-1][1] == one - 1:
            ranges[-1][1] = one
        else:
            ranges.append([one, one])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dim(value: Any) -> Dim:
    if isinstance(value, int):
        return value
    return DynamicDim(str(value["name"]), int(value["minimum"]), int(value["maximum"]))


def _tensor(data: Mapping[str, Any]) -> TensorSignature:
    return TensorSignature(
        str(data["name"]), str(data["dtype"]), tuple(_dim(size) for size in data["shape"]), tuple(data["links"])
    )


def _method(data: Mapping[str, Any]) -> MethodSignature:
    return MethodSignature(
        tuple(data["roles"]),
        tuple(_tensor(port) for port in data["inputs"]),
        tuple(_tensor(port) for port in data["outputs"]),
    )


def _tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _manifest(data: dict[str, Any]) -> Manifest:
    values = {key: value for key, value in data.items() if key not in ("format", "version")}
    return Manifest(
        **{
            **_tuples(values),
            "programs": tuple(ProgramFile(**_tuples(program)) for program in values["programs"]),
            "methods": {name: _method(method) for name, method in values["methods"].items()},
            "state": tuple(StateRow(**_tuples(row)) for row in values["state"]),
            "weights": tuple(WeightRow(**_tuples(row)) for row in values["weights"]),
            "image": ImageSettings(**_tuples(values["image"])) if values["image"] is not None else None,
            "chat": ChatSettings(**values["chat"]),
            "files": {name: FileRecord(**record) for name, record in values["files"].items()},
        }
    )
