"""`Session`: what the state of a runner holds, position by position."""

from __future__ import annotations

from dataclasses import dataclass

from triptych.errors import RunError
from triptych.manifest import Manifest
from triptych.runtime.method_runner import MethodRunner
from triptych.runtime.segments import ImageSegment, Segment
from triptych.runtime.state import SLOT_AXIS


@dataclass(frozen=True)
class ImageSpan:
    """A picture in the session: its first position, its length in positions and the key of its pixels."""

    start: int
    length: int
    key: str


class Session:
    """Tokens and pictures that a runner's state stands for.

    Everything is checked before a method runs, so a refused input leaves the session as it was.
    """

    def __init__(self, runner: MethodRunner, manifest: Manifest) -> None:
        """Take over `runner`, whose state must be at its initial values."""
        self.runner = runner
        self.max_context = manifest.max_context
        self._slotless = [row.name for row in manifest.state if SLOT_AXIS not in row.layout]
        self._image_token = manifest.image.token_id if manifest.image is not None else None
        self._tokens: list[int] = []
        self._images: list[ImageSpan] = []
        self._written = 0
        self._resets = 0

    @property
    def resets(self) -> int:
        """How often the session was reset: who keeps logits of it sees whether they still belong to it."""
        return self._resets

    @property
    def position(self) -> int:
        """The number of positions filled: where the next call starts."""
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token at every position; a picture's positions hold the placeholder's id."""
        return tuple(self._tokens)

    @property
    def images(self) -> tuple[ImageSpan, ...]:
        """The pictures in order."""
        return tuple(self._images)

    @property
    def room(self) -> int:
        """The positions left."""
        return self.max_context - self.position

    def check_room(self, length: int) -> None:
        """Raise `RunError` unless `length` more positions fit."""
        if length > self.room:
            after = f" after the {self.position} already there" if self.position else ""
            raise RunError(
                f"the prompt takes {length} positions{after}, the context holds {self.max_context}; "
                "shorten it, reset the session, or export with a larger --max-context"
            )

    def note_run(self, size: int) -> None:
        """Record that `size` positions from here on are about to be written, whether or not the call succeeds."""
        self._written = max(self._written, self.position + size)

    def append(self, segment: Segment) -> None:
        """Record that the state now holds `segment` at the end."""
        if isinstance(segment, ImageSegment):
            if self._image_token is None:
                raise RunError("an image was given to a session of a text-only model; leave it out")
            self._images.append(ImageSpan(self.position, segment.length, segment.key))
            self._tokens += [self._image_token] * segment.length
        else:
            self._tokens += segment.tokens

    def reset(self) -> None:
        """Forget everything and put the initial state back, without loading anything again."""
        self.runner.reset_state(self._written)
        self._tokens.clear()
        self._images.clear()
        self._written = 0
        self._resets += 1

    def truncate(self, position: int) -> None:
        """Forget what lies at `position` and behind.

        Slots behind the position are never read and are overwritten later, so no state changes. Raises `RunError`
        on a position that is not in the session or lies inside a picture, and where the state has rows without a
        slot axis, which cannot go back.
        """
        if not 0 <= position <= self.position:
            raise RunError(f"cannot truncate to position {position}: the session holds 0 to {self.position}")
        if self._slotless and position < self.position:
            raise RunError(f"cannot truncate: state row {self._slotless[0]} has no slots to drop; reset the session")
        for span in self._images:
            if span.start < position < span.start + span.length:
                raise RunError(
                    f"cannot truncate to position {position}, inside the image at {span.start} to "
                    f"{span.start + span.length}; choose one of the two"
                )
        del self._tokens[position:]
        self._images = [span for span in self._images if span.start < position]
