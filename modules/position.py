"""The position of the current call, known to every module below the entry point.

Standard models do not pass a start position down to their attention. An entry point that takes `start_pos`
announces it here for the time of the call, and a cache put in by a pass reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_start_pos: ContextVar[Tensor | None] = ContextVar("start_pos", default=None)


@contextmanager
def sequence_position(start_pos: Tensor | None) -> Iterator[None]:
    """Announce `start_pos` (int64 [1]) to the modules called inside; None for calls without a sequence."""
    token = _start_pos.set(start_pos)
    try:
        yield
    finally:
        _start_pos.reset(token)


def current_start_pos() -> Tensor:
    """Return the announced position; raises `RuntimeError` outside an entry point that takes one."""
    start_pos = _start_pos.get()
    if start_pos is None:
        raise RuntimeError("a KV cache was called by an entry point without a 'start_pos' input; declare that input")
    return start_pos
