"""Extra inputs of `prefill` and `decode`: each has a provider, found by the input's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from triptych.errors import ArtifactError

ExtraProvider = Callable[[int, int], Tensor]
"""Takes the start position and the number of positions S of one call."""


def position_ids(start: int, size: int) -> Tensor:
    """Return int64 [1, S]: the positions `start` to `start + size - 1`."""
    return torch.arange(start, start + size, dtype=torch.int64).unsqueeze(0)


PROVIDERS: Final[Mapping[str, ExtraProvider]] = MappingProxyType({"position_ids": position_ids})


def provider_of(method: str, name: str) -> ExtraProvider:
    """Return the provider of the extra input `name`; raises `ArtifactError` where there is none."""
    if name not in PROVIDERS:
        raise ArtifactError(
            f"{method} takes an input {name!r} that this release cannot provide (it knows {', '.join(PROVIDERS)}); "
            "export with a pipeline that removes it or use a newer release"
        )
    return PROVIDERS[name]
