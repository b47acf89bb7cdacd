"""Pure functions over logits of shape [V], float32: each returns new logits, with -inf for what it excludes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from triptych.errors import UsageError


def check_settings(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise `UsageError` on a setting no distribution can have, so that greedy calls refuse it too."""
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise UsageError(f"temperature is {temperature}; expected a finite number, 0 (greedy) or above")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k is {top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"top_p is {top_p}; expected a number above 0 and up to 1")


def scale_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divide by `temperature` above 0: more than 1 flattens the distribution, less sharpens it."""
    return logits / temperature


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Keep the `top_k` highest logits, and those equal to the lowest of them."""
    if top_k >= logits.numel():
        return logits
    lowest = torch.topk(logits, top_k).values[-1]
    return logits.masked_fill(logits < lowest, -math.inf)


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the fewest tokens whose probabilities reach `top_p`, at least one.

    Nucleus sampling: Holtzman et al., 2020, https://arxiv.org/abs/1904.09751.
    """
    if top_p == 1:
        return logits
    ordered, indices = torch.sort(logits, descending=False)
    cumulative = ordered.softmax(-1).cumsum(-1)
    excluded = cumulative <= 1 - top_p
    excluded[-1] = False
    return logits.masked_fill(torch.zeros_like(excluded).scatter(0, indices, excluded), -math.inf)
