"""What a method of a program is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from triptych.errors import ModelError

KINDS: Final = ("encoder", "token_embedding", "prefill", "prefill_first", "decode", "score", "other")


@dataclass(frozen=True, order=True)
class Role:
    """One purpose; a method has a set of them. Only encoders carry a modality ("image", "audio")."""

    kind: str
    modality: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or (self.kind == "encoder") != (self.modality is not None):
            raise ModelError(
                f"no role {self.kind!r} with modality {self.modality!r}; kinds are {', '.join(KINDS)}, "
                "and encoders alone have a modality"
            )

    def __str__(self) -> str:
        return f"{self.kind}({self.modality})" if self.modality else self.kind

    @classmethod
    def parse(cls, text: str) -> Role:
        """Read back what `str` printed."""
        kind, _, modality = text.rstrip(")").partition("(")
        return cls(kind, modality or None)


def encoder(modality: str) -> Role:
    """The role of turning one input of `modality` into embeddings or state."""
    return Role("encoder", modality)


TOKEN_EMBEDDING: Final = Role("token_embedding")
PREFILL: Final = Role("prefill")
PREFILL_FIRST: Final = Role("prefill_first")
"""A prefill that begins at position 0 and nowhere else; it takes no start_pos."""
DECODE: Final = Role("decode")
SCORE: Final = Role("score")
OTHER: Final = Role("other")
