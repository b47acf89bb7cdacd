"""`Sampler`: draws one token; the settings are arguments of each call."""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.errors import RunError
from triptych.runtime.sampling.filters import check_settings, keep_top_k, keep_top_p, scale_temperature


class Sampler:
    """Draws tokens with a random generator of its own: one seed, one sequence of draws."""

    def __init__(self, seed: int | None = None) -> None:
        """Seed the generator; None takes a seed from the operating system."""
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def sample(
        self, logits: Tensor, *, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None
    ) -> int:
        """Return the next token for `logits`, [V] or [1, V], any float dtype.

        `temperature` 0 is greedy: the highest logit, the lowest id of equals. Otherwise temperature, `top_k` and
        `top_p` apply in this order. Raises `UsageError` on impossible settings and `RunError` on logits that
        are NaN or +inf, all -inf, or of another shape.
        """
        row = _row(logits)
        check_settings(temperature, top_k, top_p)
        if temperature == 0:
            return int(row.argmax())
        row = scale_temperature(row, temperature)
        if top_k is not None:
            row = keep_top_k(row, top_k)
        if top_p is not None:
            row = keep_top_p(row, top_p)
        return int(torch.multinomial(row.softmax(-1), 1, generator=self._generator))


def _row(logits: Tensor) -> Tensor:
    if logits.dim() == 2 and logits.shape[0] == 1:
        logits = logits[0]
    if logits.dim() != 1 or logits.numel() == 0 or not logits.is_floating_point():
        raise RunError(f"logits are {logits.dtype} {list(logits.shape)}; expected floats of shape [V] or [1, V]")
    row = logits.float()
    highest = float(row.max())  # NaN if any is
    if not highest < float("inf"):
        raise RunError(f"the highest logit is {highest}: the model's output is broken; verify the artifact")
    if highest == float("-inf"):
        raise RunError("all logits are -inf: no token can follow; verify the artifact")
    return row
