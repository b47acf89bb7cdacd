"""Weights that a pass computes from others, each once in a run over all methods.

Methods share weights by their storages. A pass that computes a new weight in every method it visits would store
it once for each; a `DerivedWeights` hands the second method the tensor that the first one got.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]


def storage_place(tensor: Tensor) -> Place:
    """Return what two tensors share exactly where they are the same elements of one storage in the same order."""
    return (
        int(tensor.untyped_storage()._cdata),
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


class DerivedWeights:
    """What one run of a pass has computed; `state` names the tensors that calls change, in any method."""

    def __init__(self, state: Collection[str] = ()) -> None:
        self.state = frozenset(state)
        # The sources are kept beside the result: a storage that is freed may leave its number to another.
        self._made: dict[Hashable, tuple[tuple[Tensor, ...], Tensor]] = {}

    def get(self, sources: Sequence[Tensor], make: Callable[..., Tensor], key: Hashable) -> Tensor:
        """Return ``make(*sources)``, computed where no call before had the same storages, function and `key`."""
        memo = (tuple(map(storage_place, sources)), _code(make), key)
        if memo not in self._made:
            with torch.no_grad():
                made = make(*sources)
            # A view would bring the storage it looks at into the program, and all of its bytes.
            is_whole = made.untyped_storage().nbytes() == made.nbytes and made.is_contiguous()
            shares = storage_place(made)[0] in {place[0] for place in memo[0]}
            own = made if is_whole and not shares else made.clone(memory_format=torch.contiguous_format)
            self._made[memo] = tuple(sources), own.detach()
        return self._made[memo][1]


def _code(function: Any) -> Hashable:
    """Return what all functions made by one piece of source have in common; other callables stand for themselves."""
    while isinstance(function, partial):
        function = function.func
    code: Hashable = getattr(function, "__code__", function)
    return code
