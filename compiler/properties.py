"""Named properties of a program, which passes require and ensure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from triptych.compiler.program import KV_LAYOUT, RING_LAYOUT, Program


@dataclass(frozen=True)
class Property:
    """Something that holds of a program, known by its name.

    `violation` says why it does not hold, or returns None where it does; a property without it is taken on trust
    from the pass that ensures it.
    """

    name: str
    violation: Callable[[Program], str | None] | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name


def _without_kv_cache(program: Program) -> str | None:
    for kind in ("prefill", "decode"):
        for name, _ in program.methods_with(kind):
            caches = [row for row in program.state.values() if row.layout in (KV_LAYOUT, RING_LAYOUT)]
            if not any(name in row.writers for row in caches):
                return f"{name} writes no row of a key-value cache"
    return None


def _with_all_logits(program: Program) -> str | None:
    for kind in ("prefill", "decode"):
        for name, method in program.methods_with(kind):
            for port in method.outputs:
                if port.name == "logits" and len(port.shape) != 2:
                    return f"{name} returns logits of shape {list(port.shape)}, expected [1, V]"
    return None


KV_CACHE: Final = Property("kv-cache", _without_kv_cache)
LAST_TOKEN_LOGITS: Final = Property("last-token-logits", _with_all_logits)
QUANTIZED: Final = Property("quantized")
