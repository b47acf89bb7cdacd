"""Initial values of state rows, and putting them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from triptych.errors import ArtifactError
from triptych.manifest import StateRow
from triptych.runtime.signatures import dtype_named

STATE_FILE: Final = "state.safetensors"
SLOT_AXIS: Final = "S"


def check_rows(state: Mapping[str, Tensor], rows: Sequence[StateRow], where: str) -> None:
    """Raise `ArtifactError` unless `state` has every row with the shape and dtype that the manifest states."""
    for row in rows:
        if row.name not in state:
            raise ArtifactError(
                f"{where} has no state row {row.name}, which the manifest lists; export the model again"
            )
        tensor = state[row.name]
        if tuple(tensor.shape) != row.shape or tensor.dtype is not dtype_named(row.dtype):
            raise ArtifactError(
                f"{where}: state row {row.name} is {tensor.dtype} {list(tensor.shape)}, the manifest says "
                f"torch.{row.dtype} {list(row.shape)}; export the model again"
            )


def restore_rows(
    state: Mapping[str, Tensor], rows: Sequence[StateRow], folder: Path | None, used: int | None = None
) -> None:
    """Write each row's initial value into `state`; with `used`, only the first `used` slots of rows that have slots.

    Raises `ArtifactError` where the values of a row with ``initial="file"`` are missing.
    """
    for row in rows:
        target = state[row.name]
        initial = _initial_value(row, folder)
        if used is not None and SLOT_AXIS in row.layout:
            axis = row.layout.index(SLOT_AXIS)
            target = target.narrow(axis, 0, min(used, row.shape[axis]))
            initial = None if initial is None else initial.narrow(axis, 0, min(used, row.shape[axis]))
        if initial is None:
            target.zero_()
        else:
            target.copy_(initial)


def _initial_value(row: StateRow, folder: Path | None) -> Tensor | None:
    """Return the row's value from the file, or None for zeros."""
    if row.initial == "zeros":
        return None
    if row.initial != "file" or folder is None:
        raise ArtifactError(f"state row {row.name} has initial value {row.initial!r}; expected 'zeros' or 'file'")
    path = folder / STATE_FILE
    try:
        with safe_open(path, framework="pt") as values:
            tensor: Tensor = values.get_tensor(row.name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} gives no initial value of {row.name}: {error}; export the model again") from error
    return tensor
