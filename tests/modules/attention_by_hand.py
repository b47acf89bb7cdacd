"""Attention spelled out: loops over positions in float64, and nothing shared with the operators."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Sees = Callable[[int, int], bool]
"""(position of a query, position of a key) → does the query see the key?"""


def attend_by_hand(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    start: int,
    sees: Sees,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    addend: Callable[[int, int], float] = lambda query, key: 0.0,
) -> Tensor:
    """Query i [1, S, H, D] stands at start + i; `key` and `value` [1, L, H_kv, D] hold position p at index p."""
    query, key, value = query.double(), key.double(), value.double()
    _, length, heads, width = query.shape
    group = heads // key.shape[2]
    factor = 1 / math.sqrt(width) if scale is None else scale
    out = torch.zeros(1, length, heads, value.shape[3], dtype=torch.float64)
    for i in range(length):
        seen = [position for position in range(key.shape[1]) if sees(start + i, position)]
        for head in range(heads):
            scores = []
            for position in seen:
                score = float(query[0, i, head] @ key[0, position, head // group]) * factor
                if softcap is not None:
                    score = softcap * math.tanh(score / softcap)
                scores.append(score + addend(start + i, position))
            weights = [math.exp(score - max(scores)) for score in scores]
            for position, weight in zip(seen, weights, strict=True):
                out[0, i, head] += weight / sum(weights) * value[0, position, head // group]
    return out


def causal(query: int, key: int) -> bool:
    """Every position sees itself and those before."""
    return key <= query


def sliding(window: int, sink: int = 0) -> Sees:
    """Every position sees the last `window`, itself among them, and the first `sink`."""
    return lambda query, key: key <= query and (key > query - window or key < sink)
