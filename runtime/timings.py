"""Seconds spent in each phase of one generation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

Phase = Literal["load", "tokenize", "vision", "embed", "prefill", "decode", "sample"]


@dataclass
class Timings:
    """Wall-clock seconds by phase.

    `load` is the artifact's load, once a runner; `vision` is reading, preprocessing and encoding pictures (nothing
    for one whose features are cached); `embed`, `prefill`, `decode` and `sample` are sums over their calls;
    `first_token` runs from the request to the first token (or the EOS in its place) and contains the phases before it.
    """

    load: float = 0.0
    tokenize: float = 0.0
    vision: float = 0.0
    embed: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0
    sample: float = 0.0

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Add the block's wall time to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, phase, getattr(self, phase) + time.perf_counter() - start)
