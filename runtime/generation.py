"""The generation loop: one step (`TextDecoder`), all steps (`TextTokenGenerator`), and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from triptych.errors import RunError, UsageError
from triptych.runtime.entry_points import EntryPoints
from triptych.runtime.sampling import Sampler, check_settings
from triptych.runtime.segments import TextSegment
from triptych.runtime.session import Session
from triptych.runtime.timings import Timings

FinishReason = Literal["eos", "length", "context"]


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn; see `Sampler.sample`. Raises `UsageError` on impossible values."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_settings(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class GenerationResult:
    """A finished generation.

    `tokens` are the generated ids without the EOS; `finish_reason` is "eos", "length" (max_new_tokens reached)
    or "context" (no position left).
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    timings: Timings

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt positions by the seconds of embedding and prefill."""
        seconds = self.timings.embed + self.timings.prefill
        return self.prompt_tokens / seconds if seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first by the seconds of decoding and sampling."""
        seconds = self.timings.decode + self.timings.sample
        steps = len(self.tokens) - (self.finish_reason != "eos")
        return max(steps, 0) / seconds if seconds > 0 else 0.0


class TextDecoder:
    """One decode step."""

    def __init__(self, entry_points: EntryPoints) -> None:
        """Use the artifact's decode method."""
        self._entry_points = entry_points
        self._method = entry_points.decode

    def check(self, settings: SamplingSettings) -> None:
        """Raise `UsageError` for sampling that a decode method which chooses tokens itself cannot do."""
        if self._entry_points.chooses_tokens and settings.temperature > 0:
            raise UsageError(
                f"temperature is {settings.temperature}, and the method {self._method.name} of this artifact chooses "
                "the most likely token itself; use temperature 0, or export without greedy-token"
            )

    def step(self, session: Session, token: int) -> Tensor:
        """Append `token` to `session` and return the logits of the next one, [1, V]; raises `RunError` without room.

        A method that chooses tokens itself gives the next one, int64 [1, 1], in their place.
        """
        session.check_room(1)
        session.note_run(1)
        content = self._entry_points.content_of(session.runner, self._method, (token,))
        logits = self._method.run(session.runner, content, session.position)
        session.append(TextSegment((token,)))
        return logits


class TextTokenGenerator:
    """Samples and decodes until an EOS, a number of tokens or the end of the context.

    The last token given is sampled and not yet in the session's state.
    """

    def __init__(self, decoder: TextDecoder, sampler: Sampler, eos_ids: tuple[int, ...]) -> None:
        """Stop at any of `eos_ids`."""
        self._decoder = decoder
        self._sampler = sampler
        self._eos_ids = frozenset(eos_ids)
        self.finish_reason: FinishReason | None = None

    def generate(
        self, session: Session, logits: Tensor, max_new_tokens: int, settings: SamplingSettings, timings: Timings
    ) -> Iterator[int]:
        """Return an iterator over the tokens that follow `logits` [1, V]; `finish_reason` is set when they end.

        Raises `UsageError` where `max_new_tokens` is below 1 and for sampling that the decode method cannot do; the
        iterator raises `RunError` where the session was reset since.
        """
        self._decoder.check(settings)
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        self.finish_reason = None
        return self._tokens(session, logits, max_new_tokens, settings, timings, session.resets)

    def _next(self, logits: Tensor, settings: SamplingSettings) -> int:
        if not logits.is_floating_point():  # the method has chosen
            return int(logits)
        return self._sampler.sample(
            logits, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
        )

    def _tokens(
        self,
        session: Session,
        logits: Tensor,
        max_new_tokens: int,
        settings: SamplingSettings,
        timings: Timings,
        resets: int,
    ) -> Iterator[int]:
        for number in range(1, max_new_tokens + 1):
            with timings.measure("sample"):
                token = self._next(logits, settings)
            if token in self._eos_ids:
                self.finish_reason = "eos"
                return
            yield token
            if number == max_new_tokens:
                self.finish_reason = "length"
                return
            if session.resets != resets:
                raise RunError("this generation cannot go on: another one has reset its session; run one at a time")
            if session.room == 0:
                self.finish_reason = "context"
                return
            with timings.measure("decode"):
                logits = self._decoder.step(session, token)
