"""What every key-value cache has in common: the call, and the names of its buffers.

The names say how a row is read back, wherever only names and tensors are known: a ring that keeps the first n
positions calls its rows ``keys_sink<n>`` and ``values_sink<n>``, and an int8 row has its scales beside it under its own
name with ``_scales``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, Final, Protocol

from torch import Tensor, nn

SCALES: Final = "_scales"
_SINK: Final = re.compile(r"_sink(?P<positions>\d+)$")


def row_name(part: str, sink: int = 0) -> str:
    """Return the name of the buffer of `part` ("keys" or "values") in a cache that keeps the first `sink` positions."""
    return f"{part}_sink{sink}" if sink else part


def sink_of(name: str) -> int:
    """Return how many first positions the row called `name` keeps for ever."""
    found = _SINK.search(name)
    return int(found["positions"]) if found else 0


def without_sink(name: str) -> str:
    """Return `name` without what it says of a sink: the name that the row of a static cache has."""
    return _SINK.sub("", name)


class Kernels(Protocol):
    """The arithmetic of cached attention; shapes as in `triptych.modules.operators.attention`."""

    def cached_sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attend over a static cache."""

    def ring_sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attend over a ring and fresh positions."""

    def quantized_cached_sdpa(self, *args: Any, **kwargs: Any) -> Tensor:
        """Attend over a static int8 cache."""


class KVCache(nn.Module, ABC):
    """Base of the caches."""

    @abstractmethod
    def attend(
        self, kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor, scale: float | None
    ) -> Tensor:
        """Keep `key` and `value` [1, S, H_kv, D], positions from `start_pos` (int64 [1]) on, and attend.

        `query` is [1, S, H, D]; returns [1, S, H, D_value]. `scale` is the factor of the scores, None for 1/sqrt(D).
        """
