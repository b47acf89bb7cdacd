"""Programs on disk: graphs as JSON, every storage once as safetensors, tables as JSON. Nothing is pickled.

::

    program.json            metadata, methods with roles and ports, where each tensor lies
    methods/NAME.json       the graph of a method in torch's export schema, without tensors
    storages.safetensors    each storage once, as a flat tensor

Where nodes come from (`triptych.compiler.provenance`) is written on request only: source locations are paths of
one machine, which artifacts must not carry. The eager engine of the runtime reads the same folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer, _dict_to_dataclass, serialize
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from triptych.compiler.editing import bound_tensor, storage_identity, tensor_names
from triptych.compiler.folders import check_replaceable, folder_beside
from triptych.compiler.model import Metadata
from triptych.compiler.program import Method, Program
from triptych.compiler.provenance import CAPTURE, MADE_BY, made_by
from triptych.compiler.roles import Role
from triptych.compiler.verifier import verify
from triptych.errors import ArtifactError
from triptych.manifest import ChatSettings, DynamicDim, ImageSettings, TensorSignature
from triptych.modules import operators as _neutral_operators  # noqa: F401 (graphs name these operators)

PROGRAM_FILE: Final = "program.json"
STORAGES_FILE: Final = "storages.safetensors"
FORMAT: Final = "triptych-program"
FORMAT_VERSION: Final = 1
LEAST_TRACED_SIZE: Final = 2
LOCATIONS: Final = ("stack_trace", "nn_module_stack")


def save(program: Program, folder: Path, *, locations: bool = False) -> None:
    """Write `program` as `folder`, replacing a program that stands there; an interruption leaves the old one or none.

    With `locations` nodes keep their layer, source line and pass. Custom operators stay names: loading needs their
    library. Raises `ArtifactError` where something else is in the way.
    """
    folder = folder.resolve()
    check_replaceable(folder, PROGRAM_FILE, "program")
    with folder_beside(folder) as fresh:
        save_file(write_graphs(program, fresh, locations=locations), fresh / STORAGES_FILE)


def load(folder: Path) -> Program:
    """Read a program written by `save`; tensors that shared a storage share it again.

    Raises `ArtifactError` for a folder that holds none, or a damaged one.
    """
    if not (folder / PROGRAM_FILE).is_file():
        raise ArtifactError(f"{folder} holds no program: it has no {PROGRAM_FILE}")
    try:
        program = read_graphs(folder, load_file(folder / STORAGES_FILE))
    except Exception as error:  # whatever damaged bytes lead torch and safetensors to raise
        raise ArtifactError(f"the program in {folder} is damaged: {type(error).__name__} {error}") from error
    verify(program)
    return program


def write_graphs(program: Program, folder: Path, *, locations: bool) -> dict[str, Tensor]:
    """Write graphs and tables into `folder`, which is there, and return the storages: a name and a flat tensor each."""
    (folder / "methods").mkdir()
    storages: dict[str, Tensor] = {}
    keys: dict[int, str] = {}
    methods: dict[str, dict[str, Any]] = {}
    for name, method in program.methods.items():
        (folder / _graph_file(name)).write_bytes(_graph_json(method.exported, locations=locations))
        methods[name] = {
            "roles": sorted(map(str, method.roles)),
            "inputs": [dataclasses.asdict(port) for port in method.inputs],
            "outputs": [dataclasses.asdict(port) for port in method.outputs],
            "graph": _graph_file(name),
            "tensors": {fqn: _place(method.exported, fqn, storages, keys) for fqn in tensor_names(method.exported)},
        }
        if locations:
            methods[name]["made_by"] = {node.name: made_by(node) for node in method.exported.graph.nodes}
    tables = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "metadata": dataclasses.asdict(program.metadata),
        "methods": methods,
        "state": sorted(program.state),
    }
    (folder / PROGRAM_FILE).write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    return storages


def read_graphs(folder: Path, storages: Mapping[str, Tensor]) -> Program:
    """Return the program of graphs and tables in `folder` over `storages`; raises many kinds of errors on damage."""
    tables = dict(json.loads((folder / PROGRAM_FILE).read_text(encoding="utf-8")))
    _check_format(tables)
    methods = {name: _method(folder, data, storages) for name, data in tables["methods"].items()}
    return Program.build(methods, _metadata(tables["metadata"]))


def _check_format(tables: Mapping[str, Any]) -> None:
    found = tables["format"], tables["version"]
    if found != (FORMAT, FORMAT_VERSION):
        raise ArtifactError(f"it has format {found[0]} {found[1]}, expected {FORMAT} {FORMAT_VERSION}")


def _graph_file(name: str) -> str:
    return f"methods/{name}.json"


def _graph_json(exported: ExportedProgram, *, locations: bool) -> bytes:
    """Return the graph alone, with the debugging metadata that is asked for and no other."""
    bare = serialize(
        exported, serialize_state_dict=False, serialize_constants=False, serialize_example_inputs=False
    ).exported_program
    data = json.loads(bare)
    _keep_metadata(data, {"torch_fn", *(LOCATIONS if locations else ())})
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _keep_metadata(data: Any, kept: Collection[str]) -> None:
    """Drop what readers do not get back either: other metadata, and the storage offsets of views."""
    if isinstance(data, dict):
        if "storage_offset" in data:
            data["storage_offset"] = {"as_int": 0}
        metadata = data.get("metadata")
        if "target" in data and isinstance(metadata, dict):
            data["metadata"] = {key: value for key, value in metadata.items() if key in kept}
        for value in data.values():
            _keep_metadata(value, kept)
    elif isinstance(data, list):
        for value in data:
            _keep_metadata(value, kept)


def _place(exported: ExportedProgram, name: str, storages: dict[str, Tensor], keys: dict[int, str]) -> dict[str, Any]:
    tensor = bound_tensor(exported, name)
    identity = storage_identity(tensor)
    if identity not in keys:
        keys[identity] = name if name not in storages else f"{name}@{len(storages)}"
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        storages[keys[identity]] = torch.empty(0, dtype=tensor.dtype).set_(
            tensor.untyped_storage(), 0, (elements,), (1,)
        )
    return {
        "storage": keys[identity],
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset(),
        "kind": "state_dict" if name in exported.state_dict else "constants",
        "parameter": isinstance(tensor, torch.nn.Parameter),
    }


def _method(folder: Path, data: Mapping[str, Any], storages: Mapping[str, Tensor]) -> Method:
    tensors: dict[str, dict[str, Tensor]] = {"state_dict": {}, "constants": {}}
    for name, place in data["tensors"].items():
        tensors[place["kind"]][name] = _bind(place, storages)
    graph = _dict_to_dataclass(schema.ExportedProgram, json.loads((folder / data["graph"]).read_text(encoding="utf-8")))
    exported = ExportedProgramDeserializer().deserialize(graph, tensors["state_dict"], tensors["constants"])
    _settle_symbols(exported)
    if "made_by" in data:
        _restore_provenance(exported, data["made_by"])
    return Method(
        exported,
        frozenset(Role.parse(role) for role in data["roles"]),
        tuple(_port(port) for port in data["inputs"]),
        tuple(_port(port) for port in data["outputs"]),
    )


def _settle_symbols(exported: ExportedProgram) -> None:
    """Give the symbols the ranges that capture works with, so that passes trace alike on what was read back.

    `torch.export` takes a dynamic size for at least 2 while it traces; otherwise a mere ``x * y`` would ask whether
    the size is 1, and broadcast. The method's own bounds stay as they are.
    """
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        environment = value.fake_mode.shape_env if isinstance(value, FakeTensor) else None
        if environment is not None:
            for symbol in environment.backed_var_to_val:
                if symbol in environment.var_to_range and environment.var_to_range[symbol].upper >= LEAST_TRACED_SIZE:
                    environment.var_to_range[symbol] &= ValueRanges(LEAST_TRACED_SIZE, int_oo)
            environment.freeze()
            return


def _restore_provenance(exported: ExportedProgram, makers: Mapping[str, str]) -> None:
    """Name the passes that made nodes; `makers` has every node, so what torch added for unused results goes."""
    for node in reversed(list(exported.graph.nodes)):
        if node.name not in makers and not node.users:
            exported.graph.erase_node(node)
        elif makers[node.name] != CAPTURE:
            node.meta[MADE_BY] = makers[node.name]
    exported.graph_module.recompile()


def _bind(place: Mapping[str, Any], storages: Mapping[str, Tensor]) -> Tensor:
    storage = storages[place["storage"]].untyped_storage()
    tensor = torch.empty(0, dtype=getattr(torch, place["dtype"])).set_(
        storage, place["offset"], tuple(place["shape"]), tuple(place["stride"])
    )
    return torch.nn.Parameter(tensor, requires_grad=False) if place["parameter"] else tensor


def _port(data: Mapping[str, Any]) -> TensorSignature:
    shape = tuple(size if isinstance(size, int) else DynamicDim(**size) for size in data["shape"])
    return TensorSignature(data["name"], data["dtype"], shape, tuple(data["links"]))


def _metadata(data: Mapping[str, Any]) -> Metadata:
    def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}

    values = tuples(data)
    values["image"] = ImageSettings(**tuples(values["image"])) if values["image"] is not None else None
    values["chat"] = ChatSettings(**values["chat"])
    values["components"] = {name: tuple(prefixes) for name, prefixes in values["components"].items()}
    return Metadata(**values)
