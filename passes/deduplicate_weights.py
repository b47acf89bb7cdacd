"""``deduplicate-weights``: weights that hold the same bytes are stored once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from triptych.compiler.derived_weights import storage_place
from triptych.compiler.editing import rebuild, storage_identity
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Program, Weight


@dataclass(frozen=True)
class DeduplicateWeights(ProgramPass):
    """Let weights of equal bytes, shape, dtype and strides share one storage, within a method and across methods.

    1. Weights of one shape, dtype and strides are compared by a hash, those of one hash byte by byte: 0.0 and -0.0
       differ, and a NaN equals itself where its bits do.
    2. Of each group the one that comes first by name stays; the others become further names of its storage. State
       is none of the weights, so rows that start out alike stay apart.
    3. Of a storage that several names see in different ways (a part of it, another shape) nothing changes.
    4. A matrix that is another one transposed stays: targets take a weight as it lies in memory.
    """

    name: ClassVar[str] = "deduplicate-weights"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Announce each weight that becomes a name of another, with the bytes it frees."""
        taken: dict[int, Tensor] = {}
        candidates = list(_candidates(program, log))
        for group in _equal(candidates):
            first, *others = group
            for weight in others:
                if log.match(f"{weight.key}: {weight.nbytes} bytes, those of {first.key}"):
                    taken[storage_identity(_tensor(weight))] = _tensor(first)
        for one, other in _transposed(candidates):
            log.refused(one.key, f"it is {other.key} transposed; a target takes a weight as it lies in memory")
        if not taken:
            return program
        methods = {
            name: dataclasses.replace(method, exported=_bound_anew(method.exported, taken))
            for name, method in program.methods.items()
        }
        return program.with_methods(methods)


def _tensor(weight: Weight) -> Tensor:
    return weight.uses[0].tensor


def _candidates(program: Program, log: MatchLog) -> Iterator[Weight]:
    """Yield the weights that every name sees in the same way, and whole."""
    for weight in program.weights.values():
        places = {storage_place(use.tensor) for use in weight.uses}
        if len(places) > 1:
            log.refused(weight.key, f"its storage is seen in {len(places)} ways")
        elif not _tensor(weight).is_contiguous() or _tensor(weight).nbytes != weight.nbytes:
            log.refused(weight.key, "it is a part of its storage, or lies in it in another order")
        elif weight.nbytes:
            yield weight


def _equal(candidates: list[Weight]) -> Iterator[list[Weight]]:
    """Yield groups of two or more weights of equal bytes and form."""
    forms: dict[object, list[Weight]] = {}
    for weight in candidates:
        tensor = _tensor(weight)
        forms.setdefault((tensor.dtype, tensor.device, tensor.shape, tensor.stride()), []).append(weight)
    for alike in forms.values():
        hashed: dict[bytes, list[list[Weight]]] = {}
        for weight in alike if len(alike) > 1 else ():
            groups = hashed.setdefault(_digest(_bytes(_tensor(weight))), [])
            group = next((one for one in groups if torch.equal(_bytes(_tensor(one[0])), _bytes(_tensor(weight)))), None)
            if group is None:
                groups.append([weight])
            else:
                group.append(weight)
        yield from (group for groups in hashed.values() for group in groups if len(group) > 1)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def _digest(data: Tensor) -> bytes:
    return hashlib.blake2b(data.cpu().numpy().data, digest_size=16).digest()


def _transposed(candidates: list[Weight]) -> Iterator[tuple[Weight, Weight]]:
    """Yield pairs of matrices of which one is the other transposed, looked for by its first row and first column."""
    matrices = [weight for weight in candidates if _tensor(weight).dim() == 2 and min(_tensor(weight).shape) > 1]
    rows: dict[object, list[Weight]] = {}
    for weight in matrices:
        tensor = _tensor(weight)
        rows.setdefault((tensor.dtype, *tensor.shape, _digest(_bytes(tensor[0]))), []).append(weight)
    for weight in matrices:
        turned = _tensor(weight).t()
        for other in rows.get((turned.dtype, *turned.shape, _digest(_bytes(turned[0]))), []):
            if other.key < weight.key and torch.equal(_bytes(_tensor(other)), _bytes(turned)):
                yield weight, other


def _bound_anew(exported: ExportedProgram, taken: Mapping[int, Tensor]) -> ExportedProgram:
    """Return the method with the tensors that `taken` names by their storages in place of its own."""

    def bound(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: _in_place_of(value, taken) for name, value in values.items()}

    return rebuild(
        exported, exported.graph_module, state_dict=bound(exported.state_dict), constants=bound(exported.constants)
    )


def _in_place_of(value: Any, taken: Mapping[int, Tensor]) -> Any:
    if not isinstance(value, Tensor) or storage_identity(value) not in taken:
        return value
    shared = taken[storage_identity(value)].detach()
    return torch.nn.Parameter(shared, requires_grad=False) if isinstance(value, torch.nn.Parameter) else shared
