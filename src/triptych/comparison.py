"""`triptych diff`: what two artifacts, two saved programs or two ``.pte`` files do not have in common.

Either side becomes a table of facts, read from its files (see `triptych.inspection`), and the tables are compared.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from triptych.errors import UsageError
from triptych.inspection import inspect
from triptych.manifest import Manifest, sha256_of

SECTIONS: Final = (
    "metadata",
    "methods",
    "signatures",
    "operators",
    "delegates",
    "state",
    "quantization",
    "sizes",
    "content",
)
"""In the order in which they are shown."""

# torch's names for the parts of a tensor subclass that `unwrap_tensor_subclass` took apart.
_PARAMETRIZED: Final = re.compile(r"\.parametrizations\.(\w+)\.original\d*$")

ELSEWHERE: Final = ("files", "methods", "programs", "state", "weights")
"""Fields of the manifest that have sections of their own."""

Facts = dict[str, dict[str, Any]]
"""Section → item → value."""


@dataclass(frozen=True)
class Change:
    """One item of a section: its value on either side, None where that side has no such item."""

    section: str
    item: str
    before: Any
    after: Any

    @property
    def delta(self) -> int | None:
        """The difference of two counts, an absent one being 0; None for values that are no counts."""
        counts = [0 if value is None else value for value in (self.before, self.after)]
        if all(isinstance(count, int) and not isinstance(count, bool) for count in counts):
            return int(counts[1]) - int(counts[0])
        return None


@dataclass(frozen=True)
class Comparison:
    """Two artifacts, programs or ``.pte`` files, and all in which they differ, by section and item."""

    kind: str
    first: str
    second: str
    changes: tuple[Change, ...]

    @property
    def equal(self) -> bool:
        """True where nothing differs, not even a byte of a file."""
        return not self.changes

    def section(self, name: str) -> tuple[Change, ...]:
        """Return the changes of one section of `SECTIONS`."""
        return tuple(change for change in self.changes if change.section == name)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain data; a change has a delta where it is one of counts."""
        sections = {
            name: {
                change.item: {"before": change.before, "after": change.after}
                | ({} if change.delta is None else {"delta": change.delta})
                for change in self.section(name)
            }
            for name in SECTIONS
        }
        return {
            "kind": self.kind,
            "first": self.first,
            "second": self.second,
            "equal": self.equal,
            "changes": {name: changes for name, changes in sections.items() if changes},
        }


def compare(first: Path, second: Path) -> Comparison:
    """Compare what lies at two paths: both artifact folders, both program folders, or both ``.pte`` files.

    Raises `ArtifactError` for a path that holds none of these, and `UsageError` for two of different kinds.
    """
    contents = [inspect(path) for path in (first, second)]
    kinds = [content["kind"] for content in contents]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"cannot compare {first}, of kind {kinds[0]}, with {second}, of kind {kinds[1]}; give two artifacts, two "
            "saved programs or two .pte files"
        )
    before, after = (_facts(path, content) for path, content in zip((first, second), contents, strict=True))
    changes = tuple(
        Change(section, item, before[section].get(item), after[section].get(item))
        for section in SECTIONS
        for item in _items(before[section], after[section])
    )
    return Comparison(
        kinds[0],
        str(first),
        str(second),
        tuple(change for change in changes if change.before != change.after),
    )


def _items(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """All items in the order of the first side, those of the second alone behind them."""
    return list(dict.fromkeys((*before, *after)))


def _facts(path: Path, content: Mapping[str, Any]) -> Facts:
    facts: Facts = {section: {} for section in SECTIONS}
    facts["metadata"] = _metadata(path, content)
    graphs = _eager_operators(path, content)
    for name, method in content["methods"].items():
        facts["methods"][name] = ", ".join(method.get("roles", ())) or "present"
        _add_ports(facts["signatures"], name, method)
        counts = graphs.get(name) or method.get("operators") or method.get("undelegated_operators") or {}
        for operator, count in counts.items():
            facts["operators"][f"{name}: {operator}"] = count
        for back_end, count in method.get("delegates", {}).items():
            facts["delegates"][f"{name}: {back_end}"] = count
    for row in content["state"]:
        facts["state"][row["name"]] = _state_row(row)
    facts["quantization"] = _formats(content.get("weights", ()))
    facts["sizes"] = _sizes(path, content)
    facts["content"] = _hashes(path)
    return facts


def _eager_operators(path: Path, content: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return the operators of the methods that an artifact holds as graphs: method → operator → calls."""
    if content["kind"] != "artifact":
        return {}
    files = {method["file"] for method in content["methods"].values() if method["engine"] == "eager"}
    programs = [inspect((path / file).parent) for file in sorted(files)]
    return {name: method["operators"] for program in programs for name, method in program["methods"].items()}


def _metadata(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    if content["kind"] != "artifact":
        names = ("abi", "max_context", "vocab_size")
        return {name.replace("_", " "): content[name] for name in names if name in content}
    manifest = json.loads(Manifest.load(path).to_json())
    found: dict[str, Any] = {}
    for name, value in manifest.items():
        if name in ELSEWHERE:
            continue
        if isinstance(value, dict):
            found |= {f"{name}: {key}": one for key, one in value.items()}
        else:
            found[name.replace("_", " ")] = value
    return found


def _add_ports(signatures: dict[str, Any], method: str, data: Mapping[str, Any]) -> None:
    for direction in ("inputs", "outputs"):
        for port in data.get(direction, ()):
            name, _, shape = port.partition(": ")
            links = data.get("links", {}).get(name, ())
            word = "from" if direction == "inputs" else "to"
            signatures[f"{method}: {direction[:-1]} {name}"] = shape + (f" {word} {', '.join(links)}" if links else "")


def _state_row(row: Mapping[str, Any]) -> str:
    if "shape" not in row:
        return f"{row['nbytes']} bytes in {', '.join(row['methods'])}"
    users = f"read by {', '.join(row['readers'])}; written by {', '.join(row['writers'])}"
    return f"{row['dtype']}{row['shape']} {row['layout']}, {users}"


def _formats(weights: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return how each weight of the model is stored; a quantized one has its integers, scales and zero points."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for weight in weights:
        parts.setdefault(_PARAMETRIZED.sub(r".\1", weight["name"]), []).append(weight)
    return {name: _format(name, found) for name, found in parts.items()}


def _format(name: str, parts: list[Mapping[str, Any]]) -> str:
    tensors = " + ".join(f"{one['dtype']}{one['shape']}" for one in parts)
    aliases = dict.fromkeys(_PARAMETRIZED.sub(r".\1", alias) for one in parts for alias in one["aliases"])
    others = "".join(f" = {alias}" for alias in aliases if alias != name)
    users = dict.fromkeys(user for one in parts for user in one["users"])
    return f"{tensors}{others}, used by {', '.join(users)}"


def _sizes(path: Path, content: Mapping[str, Any]) -> dict[str, int]:
    names = {"weights": "weights in bytes", "stored": "constants stored in the file in bytes"}
    sizes = {text: sum(one["bytes"] for one in content[name]) for name, text in names.items() if name in content}
    sizes["state in bytes"] = sum(_state_bytes(row) for row in content["state"])
    return sizes | {f"{name} in bytes": file.stat().st_size for name, file in _files(path).items()}


def _state_bytes(row: Mapping[str, Any]) -> int:
    import torch

    if "nbytes" in row:
        return int(row["nbytes"])
    dtype: torch.dtype = getattr(torch, row["dtype"])
    return math.prod(map(int, row["shape"])) * dtype.itemsize


def _hashes(path: Path) -> dict[str, str]:
    return {name: f"sha256 {sha256_of(file)[:16]}…" for name, file in _files(path).items()}


def _files(path: Path) -> dict[str, Path]:
    """Return name → file, of all files of a folder."""
    if path.is_file():
        return {"the file": path}
    return {one.relative_to(path).as_posix(): one for one in sorted(path.rglob("*")) if one.is_file()}
