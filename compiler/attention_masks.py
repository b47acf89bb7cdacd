"""Reading what an attention mask means off its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

MASKED_OUT: Final = -1e4
"""An additive mask excludes a key by a value of at most this: its exponential is zero in every floating-point type."""


@dataclass(frozen=True)
class CausalBand:
    """Query i attends to itself and to the keys before it: to the last `window` of them all, or to every one (None)."""

    window: int | None = None

    def within(self, length: int) -> CausalBand:
        """Return what a mask over `length` positions shows of this: a window only where it is shorter."""
        return self if self.window is not None and self.window < length else CausalBand()


def read_mask(mask: Tensor) -> CausalBand | str:
    """Say what `mask` ([..., S_q, S_k], boolean with True for "attend", or additive) lets fresh positions attend to.

    The answer is a causal band, or a phrase that says what was seen instead. A window is only visible in a mask over
    more positions than it has.
    """
    allowed = _allowed(mask)
    if isinstance(allowed, str):
        return allowed
    queries, keys = allowed.shape[-2:]
    if queries != keys:
        return f"covers {keys} keys for {queries} queries"
    allowed = allowed.reshape(-1, queries, keys)
    if len(allowed) > 1 and not bool((allowed == allowed[0]).all()):
        return "differs between heads or batch rows"
    (square,) = allowed[:1]
    later = square.triu(1).nonzero()
    if len(later):
        query, key = later[0].tolist()
        return f"lets query {query} attend to the later key {key}"
    if not bool(square[-1].any()):
        return f"lets query {queries - 1} attend to no key"
    band = CausalBand(int(square[-1].sum())).within(keys)
    expected = torch.ones_like(square).tril().triu(1 - (band.window or keys))
    wrong = (square != expected).any(-1).nonzero()
    if len(wrong):
        query = int(wrong[0])
        return f"lets query {query} attend to {_runs(square[query])}, and query {keys - 1} to {_runs(square[-1])}"
    return band


def _allowed(mask: Tensor) -> Tensor | str:
    if mask.dtype == torch.bool:
        return mask
    allowed = mask == 0
    excluded = mask <= MASKED_OUT
    if not bool((allowed | excluded).all()):
        other = mask[~(allowed | excluded)]
        return f"adds a bias to the scores ({float(other.min()):.3g} to {float(other.max()):.3g})"
    return allowed


def _runs(row: Tensor) -> str:
    """Name the keys a query attends to."""
    keys = row.nonzero().flatten().tolist()
    if not keys:
        return "no key"
    if keys[-1] - keys[0] + 1 == len(keys):
        return f"key {keys[0]}" if len(keys) == 1 else f"keys {keys[0]} to {keys[-1]}"
    return f"{len(keys)} keys between {keys[0]} and {keys[-1]}"
