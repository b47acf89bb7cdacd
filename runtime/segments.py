"""A prompt as a list of segments, its length known before anything runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from triptych.errors import RunError
from triptych.manifest import ImageSettings
from triptych.runtime.tokenizers import Tokenizer


@dataclass(frozen=True)
class TextSegment:
    """Consecutive text tokens."""

    tokens: tuple[int, ...]

    @property
    def length(self) -> int:
        """The positions it takes."""
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class ImageSegment:
    """One picture: `pixel_values` for the encoder, the `length` positions it takes, and the `key` of its pixels."""

    pixel_values: Tensor
    length: int
    key: str

    @classmethod
    def of(cls, pixel_values: Tensor, length: int) -> ImageSegment:
        """Return the segment of `pixel_values` with the key made from them."""
        return cls(pixel_values, length, pixel_key(pixel_values))


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, eq=False)
class Prompt:
    """What goes before the first generated token."""

    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """The positions all segments take together."""
        return sum(segment.length for segment in self.segments)


def pixel_key(pixel_values: Tensor) -> str:
    """Return a key equal for equal pixels: the hex sha256 of shape, dtype and values."""
    digest = hashlib.sha256(f"{pixel_values.dtype} {tuple(pixel_values.shape)}".encode())
    digest.update(pixel_values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def build_prompt(
    text: str,
    pictures: Sequence[Tensor],
    tokenizer: Tokenizer,
    settings: ImageSettings | None = None,
    *,
    bos: bool = False,
) -> Prompt:
    """Tokenize `text` and put each picture (`pixel_values`) where a placeholder token stands.

    The placeholder's one id becomes the settings' prefix, the picture's embeddings and the suffix. `bos` puts
    the tokenizer's BOS before. Raises `RunError` where text is empty or placeholders and pictures differ in
    number.
    """
    tokens = tokenizer.encode(text, bos=bos)
    if not tokens:
        raise RunError("the prompt is empty: there is no token to start from; give some text")
    if settings is None:
        if pictures:
            raise RunError(f"{len(pictures)} image(s) given to a text-only model; leave them out")
        return Prompt((TextSegment(tuple(tokens)),))
    places = tokens.count(settings.token_id)
    if places != len(pictures):
        raise RunError(
            f"the prompt has {places} placeholder(s) {settings.token} and {len(pictures)} image(s); "
            "write one placeholder for each image"
        )
    segments: list[Segment] = []
    pending: list[int] = []
    remaining = iter(pictures)
    for token in tokens:
        if token != settings.token_id:
            pending.append(token)
            continue
        pending += settings.prefix
        if pending:
            segments.append(TextSegment(tuple(pending)))
        segments.append(ImageSegment.of(next(remaining), settings.tokens))
        pending = list(settings.suffix)
    if pending:
        segments.append(TextSegment(tuple(pending)))
    return Prompt(tuple(segments))
