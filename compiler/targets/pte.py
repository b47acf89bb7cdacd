"""Reading an emitted ``.pte`` back: what it really holds, from the file and not from what was asked for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from triptych.errors import ArtifactError, LoweringError

_ELEMENT_SIZES: Final = {
    "BYTE": 1,
    "CHAR": 1,
    "BOOL": 1,
    "SHORT": 2,
    "HALF": 2,
    "BFLOAT16": 2,
    "INT": 4,
    "FLOAT": 4,
    "LONG": 8,
}


@dataclass(frozen=True)
class Placement:
    """Where a state row lies: arena, byte offset in it, and size."""

    arena: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PteMethod:
    """One method of the file.

    `delegates` counts delegates by back end; `operators` counts the kernel calls outside them; `state` says
    where each named buffer lies; `constants` are the indices of the constants in use, and `weights` the keys
    of the named data that its delegates refer to.
    """

    delegates: Mapping[str, int]
    operators: Mapping[str, int]
    state: Mapping[str, Placement]
    constants: frozenset[int]
    weights: frozenset[str]


@dataclass(frozen=True)
class PteFile:
    """The file: its methods, and the size in bytes of each constant and each named weight, stored once."""

    methods: Mapping[str, PteMethod]
    constants: Mapping[int, int]
    weights: Mapping[str, int]


def read_pte(path: Path) -> PteFile:
    """Parse `path`; raises `ArtifactError` for a file that is no ``.pte`` and `LoweringError` without executorch."""
    try:
        from executorch.exir._serialize._program import deserialize_pte_binary
    except ImportError as error:
        raise LoweringError(f"reading a .pte needs executorch ({error}); install triptych[executorch]") from error
    data = path.read_bytes()
    if data[4:8] != b"ET12":
        raise ArtifactError(f"{path} is no ExecuTorch program: its identifier is {data[4:8]!r}, expected b'ET12'")
    try:
        file = deserialize_pte_binary(data)
    except Exception as error:
        raise ArtifactError(f"{path} is damaged: {type(error).__name__} {error}; export the model again") from error
    named = file.named_data
    weights = {key: len(named.buffers[entry.buffer_index]) for key, entry in named.pte_data.items()} if named else {}
    inline = [bytes(entry.data) for entry in file.program.backend_delegate_data]
    methods = {plan.name: _method(plan, inline, weights) for plan in file.program.execution_plan}
    constants = {index: len(buffer.storage) for index, buffer in enumerate(file.program.constant_buffer) if index}
    return PteFile({name: method for name, method in methods.items() if method is not None}, constants, weights)


def _method(plan: Any, delegate_data: list[bytes], weights: Mapping[str, int]) -> PteMethod | None:
    if not plan.chains or not plan.chains[0].instructions:
        return None
    operators: Counter[str] = Counter()
    for chain in plan.chains:
        for instruction in chain.instructions:
            call = instruction.instr_args
            if type(call).__name__ == "KernelCall":
                operator = plan.operators[call.op_index]
                operators[f"{operator.name}.{operator.overload}" if operator.overload else operator.name] += 1
    state: dict[str, Placement] = {}
    constants: set[int] = set()
    for value in plan.values:
        tensor = value.val
        if type(tensor).__name__ != "Tensor":
            continue
        extra, place = tensor.extra_tensor_info, tensor.allocation_info
        if place is not None and extra is not None and extra.fully_qualified_name:
            offset = (place.memory_offset_high << 32) + place.memory_offset_low
            state[extra.fully_qualified_name] = Placement(place.memory_id, offset, _nbytes(tensor))
        elif tensor.data_buffer_idx and place is None:
            constants.add(tensor.data_buffer_idx)
    used = {
        key for delegate in plan.delegates for key in weights if key.encode() in delegate_data[delegate.processed.index]
    }
    return PteMethod(
        dict(sorted(Counter(delegate.id for delegate in plan.delegates).items())),
        dict(operators.most_common()),
        state,
        frozenset(constants),
        frozenset(used),
    )


def _nbytes(tensor: Any) -> int:
    return int(math.prod(tensor.sizes)) * _ELEMENT_SIZES[tensor.scalar_type.name]
