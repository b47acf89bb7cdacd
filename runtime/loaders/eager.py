"""The eager engine: a saved program run by torch, the oracle of the others.

Reads the folder that a program is saved in (``program.json``, ``methods/*.json``, ``storages.safetensors``)
with torch's own deserializer of export graphs; nothing is unpickled, and no module of the compiler is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._export.serde import schema
from torch._export.serde.serialize import ExportedProgramDeserializer, SerializeError, _dict_to_dataclass

from triptych.errors import ArtifactError, RunError
from triptych.manifest import Manifest, ProgramFile
from triptych.runtime.method_runner import Capabilities, MethodRunner, owned_rows
from triptych.runtime.state import check_rows
from triptych.runtime.threads import torch_threads

STORAGES_FILE: Final = "storages.safetensors"


class EagerRunner(MethodRunner):
    """Runs each method as a torch module; all modules share the tensors of state and weights."""

    def __init__(self, folder: Path, program: ProgramFile, manifest: Manifest, threads: int | None) -> None:
        rows = owned_rows(manifest, program)
        super().__init__(manifest, program.methods, rows, folder)
        self._threads = threads
        path = folder / program.file
        try:
            tables = json.loads(path.read_text(encoding="utf-8"))
            storages = load_file(path.parent / STORAGES_FILE)
            tensors: dict[str, Tensor] = {}
            self._modules = {
                name: _module(path.parent, tables["methods"][name], storages, tensors) for name in program.methods
            }
        except (KeyError, TypeError, ValueError, OSError, SafetensorError, SerializeError) as error:
            raise ArtifactError(f"{path} is damaged: {type(error).__name__} {error}; export the model again") from error
        self._state = {row.name: tensors[row.name] for row in rows if row.name in tensors}
        check_rows(self._state, rows, str(path))
        self.reset_state()

    @property
    def capabilities(self) -> Capabilities:
        """Live state, as every tensor here is torch's own."""
        return Capabilities(engines=("eager",))

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The buffers that all methods share."""
        return self._state

    def bind_state(self, rows: Mapping[str, Tensor]) -> None:
        """Put another engine's tensors in the place of the buffers so named."""
        for module in self._modules.values():
            for name, _ in list(module.named_buffers()):
                if name in rows:
                    owner, _, attribute = name.rpartition(".")
                    setattr(module.get_submodule(owner), attribute, rows[name])

    def _execute(self, method: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        try:
            with torch.no_grad(), torch_threads(self._threads):
                outputs = self._modules[method](*tensors)
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(f"{method} failed: {reason}") from error
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    def _release(self) -> None:
        self._modules.clear()


def _module(
    folder: Path, data: Mapping[str, Any], storages: Mapping[str, Tensor], tensors: dict[str, Tensor]
) -> nn.Module:
    """Build one method; a name bound before (by another method) gets the same tensor again."""
    bound: dict[str, dict[str, Tensor]] = {"state_dict": {}, "constants": {}}
    for name, place in data["tensors"].items():
        tensor = _bind(place, storages)
        known = tensors.setdefault(name, tensor)
        is_same = known.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        bound[place["kind"]][name] = known if is_same else tensor
    graph = _dict_to_dataclass(schema.ExportedProgram, json.loads((folder / data["graph"]).read_text(encoding="utf-8")))
    exported = ExportedProgramDeserializer().deserialize(graph, bound["state_dict"], bound["constants"])
    return exported.module(check_guards=False)


def _bind(place: Mapping[str, Any], storages: Mapping[str, Tensor]) -> Tensor:
    tensor = torch.empty(0, dtype=getattr(torch, place["dtype"])).set_(
        storages[place["storage"]].untyped_storage(), place["offset"], tuple(place["shape"]), tuple(place["stride"])
    )
    return torch.nn.Parameter(tensor, requires_grad=False) if place["parameter"] else tensor


def load_eager(folder: Path, program: ProgramFile, manifest: Manifest, threads: int | None) -> MethodRunner:
    """Load a saved program; raises `ArtifactError` for a damaged one."""
    return EagerRunner(folder, program, manifest, threads)
