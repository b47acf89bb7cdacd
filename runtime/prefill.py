"""`TextPrefiller`: a prompt into the state, and the logits behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from triptych.errors import RunError, UsageError
from triptych.manifest import Dim, DynamicDim
from triptych.runtime.entry_points import EntryPoints, LanguageMethod
from triptych.runtime.image_prefill import ImagePrefiller
from triptych.runtime.segments import ImageSegment, Prompt, Segment, TextSegment
from triptych.runtime.session import Session
from triptych.runtime.timings import Timings


class TextPrefiller:
    """Runs prompts through `prefill`, several positions a call, or through `decode` one by one.

    The latter happens where the artifact has no prefill method, and for a chunk of text shorter than that method
    takes. No chunk splits a picture. A chunk at position 0 goes to the method made for it, where there is one.
    """

    def __init__(self, entry_points: EntryPoints, images: ImagePrefiller, chunk_size: int | None = None) -> None:
        """Prefill at most `chunk_size` positions a call; None takes as many as the method does.

        Raises `UsageError` on a chunk size below 1.
        """
        if chunk_size is not None and chunk_size < 1:
            raise UsageError(f"chunk_size is {chunk_size}; expected at least 1")
        self._entry_points = entry_points
        self._images = images
        self._chunk_size = chunk_size

    def prefill(self, session: Session, prompt: Prompt, timings: Timings) -> Tensor:
        """Append `prompt` to `session` and return the logits of its last position, [1, V].

        A method that chooses tokens itself gives int64 [1, 1] in their place.

        Raises `RunError`, before anything runs, where the prompt is empty, does not fit into the context or has
        a picture longer than a chunk.
        """
        session.check_room(prompt.length)
        if prompt.length == 0:
            raise RunError("the prompt is empty: there is no token to start from; give some text")
        method = self._entry_points.prefill
        if method is None:
            return self._sequential(session, _text_tokens(prompt.segments), timings)
        signature = session.runner.signature(method.name)
        smallest, largest = _bounds(signature.input(method.content).shape[1])
        if self._chunk_size is not None:
            largest = min(largest, max(self._chunk_size, smallest))
        chunks = plan_chunks(prompt.segments, largest)
        for chunk in chunks:
            if _length(chunk) < smallest:
                _text_tokens(chunk)  # refuses a picture before anything runs
        with timings.measure("vision"):
            for segment in prompt.segments:
                if isinstance(segment, ImageSegment) and segment.length > 0:
                    self._images.features(segment)
        logits: Tensor | None = None
        for planned in chunks:
            chunk = self._without_written(session, planned, timings)
            size = _length(chunk)
            if size == 0:
                continue
            if size < smallest:
                logits = self._sequential(session, _text_tokens(chunk), timings)
                continue
            with timings.measure("embed"):
                content = self._content(session, method, chunk)
            with timings.measure("prefill"):
                session.note_run(size)
                chosen = self._method_for(session, size, method)
                logits = chosen.run(session.runner, content, session.position)
            for segment in chunk:
                session.append(segment)
        assert logits is not None  # a prompt that is not empty has at least one chunk
        return logits

    def _without_written(self, session: Session, chunk: Sequence[Segment], timings: Timings) -> list[Segment]:
        """Encode the pictures of `chunk` that become state, which stand at its beginning, and return the rest of it."""
        rest: list[Segment] = []
        for segment in chunk:
            if isinstance(segment, ImageSegment) and segment.length == 0:
                with timings.measure("vision"):
                    self._images.write(segment)
                session.append(segment)
            else:
                rest.append(segment)
        return rest

    def _method_for(self, session: Session, size: int, prefill: LanguageMethod) -> LanguageMethod:
        first = self._entry_points.prefill_first
        if first is None or session.position > 0:
            return prefill
        smallest, largest = _bounds(session.runner.signature(first.name).input(first.content).shape[1])
        return first if smallest <= size <= largest else prefill

    def _content(self, session: Session, method: LanguageMethod, chunk: Sequence[Segment]) -> Tensor:
        """Return the chunk's embeddings [1, S, D], or its tokens [1, S] where prefill takes those."""
        pieces = []
        for segment in chunk:
            if isinstance(segment, ImageSegment):
                pieces.append(self._images.features(segment).unsqueeze(0))
                continue
            pieces.append(self._entry_points.content_of(session.runner, method, segment.tokens))
        return torch.cat(pieces, 1)

    def _sequential(self, session: Session, tokens: Sequence[int], timings: Timings) -> Tensor:
        """Run tokens one at a time through decode; return the last logits."""
        for token in tokens:
            with timings.measure("prefill"):
                session.note_run(1)
                content = self._entry_points.content_of(session.runner, self._entry_points.decode, (token,))
                logits = self._entry_points.decode.run(session.runner, content, session.position)
            session.append(TextSegment((token,)))
        return logits


def plan_chunks(segments: Sequence[Segment], largest: int) -> list[list[Segment]]:
    """Split `segments` into chunks of at most `largest` positions; text is cut anywhere, a picture nowhere.

    A picture that takes no positions becomes state, which only what follows may see: it begins a chunk.
    Raises `RunError` where a picture alone is longer than a chunk.
    """
    chunks: list[list[Segment]] = [[]]
    room = largest
    for segment in segments:
        if isinstance(segment, ImageSegment):
            if segment.length > largest:
                raise RunError(
                    f"an image takes {segment.length} positions, a prefill call at most {largest}; "
                    "use a larger chunk_size or export with a larger --max-context"
                )
            if segment.length > room or segment.length == 0:
                chunks.append([])
                room = largest
            chunks[-1].append(segment)
            room -= segment.length
            continue
        rest = segment.tokens
        while rest:
            if room == 0:
                chunks.append([])
                room = largest
            chunks[-1].append(TextSegment(rest[:room]))
            taken = len(rest[:room])
            rest, room = rest[taken:], room - taken
    return [chunk for chunk in chunks if chunk]


def _bounds(dim: Dim) -> tuple[int, int]:
    return (dim.minimum, dim.maximum) if isinstance(dim, DynamicDim) else (dim, dim)


def _length(segments: Sequence[Segment]) -> int:
    return sum(segment.length for segment in segments)


def _text_tokens(segments: Sequence[Segment]) -> list[int]:
    """Return the tokens of text segments; raises `RunError` on a picture, which decode cannot take."""
    tokens: list[int] = []
    for segment in segments:
        if isinstance(segment, ImageSegment):
            if segment.length == 0:
                continue
            raise RunError(
                f"an image of {segment.length} positions cannot be prefilled: the artifact has no prefill method that "
                "takes so few; put more text around it or export again"
            )
        tokens += segment.tokens
    return tokens
