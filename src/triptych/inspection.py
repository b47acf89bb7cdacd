"""`triptych inspect`: what an artifact or a saved program really holds, read from its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from triptych.errors import ArtifactError
from triptych.manifest import DynamicDim, Manifest, TensorSignature


def inspect(path: Path) -> dict[str, Any]:
    """Return the content of the artifact folder, program folder or ``.pte`` file at `path` as plain data.

    Raises `ArtifactError` for anything else.
    """
    try:
        return _inspect(path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__} {error}; export the model again") from error


def _inspect(path: Path) -> dict[str, Any]:
    if (path / "program.json").is_file():
        return {"kind": "program", **_program(path)}
    if path.is_file():
        if path.suffix != ".pte":
            raise ArtifactError(f"{path} is no artifact: give a folder made by `triptych export`, or a .pte file")
        return {"kind": "pte", "file": str(path), **_pte(path)}
    manifest = Manifest.load(path)
    manifest.check_files(path)
    return {"kind": "artifact", **_artifact(path, manifest)}


def _artifact(path: Path, manifest: Manifest) -> dict[str, Any]:
    engines = {method: program for program in manifest.programs for method in program.methods}
    found: dict[str, Any] = {
        "artifact": str(path),
        "abi": manifest.abi,
        "target": manifest.target,
        "recipe": manifest.recipe,
        "pipeline": manifest.pipeline,
        "max_context": manifest.max_context,
        "vocab_size": manifest.vocab_size,
        "methods": {
            name: {
                "roles": list(method.roles),
                "engine": engines[name].engine,
                "file": engines[name].file,
                "inputs": [_port(port) for port in method.inputs],
                "outputs": [_port(port) for port in method.outputs],
                "links": _links((*method.inputs, *method.outputs)),
            }
            for name, method in manifest.methods.items()
        },
        "state": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "dtype": row.dtype,
                "layout": row.layout,
                "owner": row.owner,
                "readers": list(row.readers),
                "writers": list(row.writers),
            }
            for row in manifest.state
        ],
        "files": {name: record.bytes for name, record in manifest.files.items()},
        "versions": dict(manifest.versions),
    }
    found["weights"] = [
        {
            "name": row.name,
            "dtype": row.dtype,
            "shape": list(row.shape),
            "bytes": row.bytes,
            "aliases": list(row.aliases),
            "users": list(row.users),
        }
        for row in manifest.weights
    ]
    for program in manifest.programs:
        if program.engine == "executorch":
            _merge(found, _pte(path / program.file))
    return found


def _merge(found: dict[str, Any], pte: dict[str, Any]) -> None:
    for name, method in pte["methods"].items():
        if name in found["methods"]:
            found["methods"][name].update(method)
    placements = {row["name"]: row for row in pte["state"]}
    for row in found["state"]:
        row.update({key: placements[row["name"]][key] for key in ("arena", "offset", "nbytes", "one_place")})
    found["stored"] = pte["stored"]


def _port(port: TensorSignature) -> str:
    sizes = [f"{d.name}={d.minimum}..{d.maximum}" if isinstance(d, DynamicDim) else str(d) for d in port.shape]
    return f"{port.name}: {port.dtype}[{', '.join(sizes)}]"


def _links(ports: tuple[TensorSignature, ...]) -> dict[str, list[str]]:
    return {port.name: list(port.links) for port in ports if port.links}


def _operators(graph: Any) -> dict[str, int]:
    """Return operator → number of calls, most frequent first."""
    calls = (str(node.target) for node in graph.nodes if node.op == "call_function")
    return dict(Counter(calls).most_common())


def _pte(path: Path) -> dict[str, Any]:
    from triptych.compiler.targets.pte import read_pte

    file = read_pte(path)
    rows: dict[str, list[tuple[str, Any]]] = {}
    for name, method in file.methods.items():
        for row, place in method.state.items():
            rows.setdefault(row, []).append((name, place))
    weights = [
        {"key": key, "bytes": size, "storage": "named data", "users": sorted(_users(file, key))}
        for key, size in file.weights.items()
    ]
    weights += [
        {
            "key": f"constant {index}",
            "bytes": size,
            "storage": "constant segment",
            "users": sorted(name for name, method in file.methods.items() if index in method.constants),
        }
        for index, size in file.constants.items()
    ]
    return {
        "methods": {
            name: {"delegates": dict(method.delegates), "undelegated_operators": dict(method.operators)}
            for name, method in file.methods.items()
        },
        "state": [
            {
                "name": row,
                "arena": places[0][1].arena,
                "offset": places[0][1].offset,
                "nbytes": places[0][1].nbytes,
                "one_place": len({place for _, place in places}) == 1,
                "methods": [name for name, _ in places],
            }
            for row, places in sorted(rows.items())
        ],
        "stored": weights,
    }


def _users(file: Any, key: str) -> Iterator[str]:
    for name, method in file.methods.items():
        if key in method.weights:
            yield name


def _program(folder: Path) -> dict[str, Any]:
    from triptych.compiler.storage import load

    program = load(folder)
    return {
        "program": str(folder),
        "abi": program.metadata.abi,
        "max_context": program.metadata.max_context,
        "vocab_size": program.metadata.vocab_size,
        "methods": {
            name: {
                "roles": sorted(map(str, method.roles)),
                "inputs": [_port(port) for port in method.inputs],
                "outputs": [_port(port) for port in method.outputs],
                "links": _links((*method.inputs, *method.outputs)),
                "operators": _operators(method.exported.graph),
            }
            for name, method in program.methods.items()
        },
        "state": [
            {
                "name": row.name,
                "shape": list(row.shape),
                "dtype": str(row.dtype).removeprefix("torch."),
                "layout": row.layout,
                "readers": list(row.readers),
                "writers": list(row.writers),
            }
            for row in program.state.values()
        ],
        "weights": [
            {
                "name": weight.key,
                "dtype": str(weight.dtype).removeprefix("torch."),
                "shape": list(weight.uses[0].tensor.shape),
                "bytes": weight.nbytes,
                "aliases": [name for name in weight.names if name != weight.key],
                "users": list(weight.users),
            }
            for weight in program.weights.values()
        ],
    }
