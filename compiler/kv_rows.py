"""Reading key-value rows back: what a cache holds of each position, whatever its kind.

Only the names and the tensors of rows are needed, so every runner's state can be read; see `triptych.modules.kv_cache`
for what the names say. A row with fewer slots than positions is a ring.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from triptych.modules.kv_cache.base import SCALES, sink_of, without_sink
from triptych.modules.routing import HANDLER_NAME


def is_kv_row(name: str) -> bool:
    """Return whether the state row called `name` belongs to a key-value cache, its scales included."""
    return HANDLER_NAME in name.split(".")


def read_rows(state: Mapping[str, Tensor], position: int) -> dict[str, Tensor]:
    """Return copies of the rows in `state` after `position` positions.

    Key-value rows become [B, kept, H, D] in the order of positions: all of them, or of a ring the first ones it keeps
    for ever and the last ones. Int8 rows become the floats they stand for, and their scales are no rows of the result.
    """
    rows = {}
    for name, row in state.items():
        if not is_kv_row(name):
            rows[name] = row.clone()
        elif not (name.endswith(SCALES) and name.removesuffix(SCALES) in state):
            scales = state.get(name + SCALES)
            slots = _slots(position, row.shape[1], sink_of(name))
            rows[name] = row[:, slots] if scales is None else row[:, slots].to(scales.dtype) * scales[:, slots]
    return rows


def wanted_row(rows: Mapping[str, Tensor], name: str, row: Tensor) -> Tensor | None:
    """Return what `row` must hold: the keys or values of the positions it keeps, taken from `rows` with all of them."""
    wanted = rows.get(without_sink(name))
    if wanted is None or not is_kv_row(name) or wanted.dim() != 4 or row.shape[1] >= wanted.shape[1]:
        return wanted
    sink = sink_of(name)
    return torch.cat([wanted[:, :sink], wanted[:, wanted.shape[1] - (row.shape[1] - sink) :]], dim=1)


def _slots(position: int, slots: int, sink: int) -> list[int]:
    """Return where the kept ones of the first `position` positions lie."""
    if position <= slots:
        return list(range(position))
    window = slots - sink
    return [*range(sink), *(sink + (one - sink) % window for one in range(position - window, position))]
