"""Which conversations parity is judged on: real text, random ids, a chunked prefill, a second turn, images.

A plan fixes the steps and draws its tokens from a seed, so that a trace can be drawn again where the model
happens not to react to a changed input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from triptych.compiler.model import Model
from triptych.compiler.trace import CallTrace, Step
from triptych.errors import UsageError
from triptych.manifest import ImageSettings

PROMPT_LENGTHS: Final = (1, 17, 300)

_TURN_KINDS: Final = ("prefill", "prefill", "decode", "prefill", "decode")
# A chunked prefill, an answer, and a second turn; the first that fits is taken.
TURNS: Final = tuple(
    tuple(Step(kind, count) for kind, count in zip(_TURN_KINDS, counts, strict=True))
    for counts in ((9, 8, 3, 7, 3), (3, 2, 1, 2, 1))
)

WHOLE_CONTEXTS: Final = range(128, 301)
"""Context lengths that one conversation fills to the last slot.

Positions in a type that is too narrow go wrong at 128, in a second prefill too, which begins at three quarters; a table
or a mask that is one short goes wrong at the last slot. The other conversations come near the end of a shorter context,
and a longer one has room for a prompt of 300.
"""

TEXT: Final = (
    "A ship left the harbour at dawn. Its captain had counted the crates twice: forty-two of tea, seven of "
    "porcelain, and one, unlabelled, that nobody would open. 'Keep it dry,' the merchant had said, and paid in "
    "silver. By noon the wind had turned; by evening the coast was a thin grey line behind them. The cook asked "
    "what was in the crate. The mate said books. The boy who slept beside it said that, some nights, it hummed. "
)

Pictures = Callable[[int], tuple[Tensor, ...]]
"""count → so many pictures, each as the encoder's `pixel_values`."""


@dataclass(frozen=True)
class Subject:
    """What conversations have to fit: vocabulary, context length in positions, tokenizer and images if any."""

    vocab_size: int
    max_context: int
    tokenizer_file: Path | None = None
    image: ImageSettings | None = None
    pictures: Pictures | None = None


@dataclass(frozen=True)
class TracePlan:
    """A conversation whose tokens are drawn from a seed."""

    name: str
    steps: tuple[Step, ...]
    tokens: Callable[[int], Tensor]
    pixel_values: tuple[Tensor, ...] = ()
    image_token_id: int | None = None

    def draw(self, seed: int) -> CallTrace:
        """Return the trace for one seed."""
        return CallTrace(self.name, self.tokens(seed), self.steps, self.pixel_values, self.image_token_id)

    def within(self, kept: Tensor) -> TracePlan:
        """Return the plan over the tokens in `kept`, int64 [K]: others are replaced by some of these."""
        choices = kept[kept != self.image_token_id] if self.image_token_id is not None else kept
        return dataclasses.replace(self, tokens=partial(_kept_tokens, self.tokens, kept, choices))


def subject_of(model: Model) -> Subject:
    """Return what conversations with `model` have to fit; its pictures are smooth noise."""
    encoders = model.entry_points_with("encoder")
    image = model.metadata.image if encoders else None
    shape = encoders[0].example_inputs()[0].shape if encoders else ()
    return Subject(
        model.metadata.vocab_size,
        model.metadata.max_context,
        model.tokenizer_file,
        image,
        partial(_smooth_noise, tuple(shape)) if image is not None else None,
    )


def make_plans(subject: Subject, tokens: int, prompt_lengths: Sequence[int] = PROMPT_LENGTHS) -> list[TracePlan]:
    """Plan text and random ids after prompts of each length, two prefills and a second turn, and images.

    A context of a length in `WHOLE_CONTEXTS` is filled once to its last slot. `tokens` positions are decoded after
    each prompt; prompts that do not fit the context are left out. Raises `UsageError` where none fits.
    """
    fitting = [length for length in prompt_lengths if length + tokens <= subject.max_context]
    if not fitting or tokens < 1:
        raise UsageError(
            f"{tokens} tokens after a prompt of {min(prompt_lengths)} do not fit the context of "
            f"{subject.max_context}; decode between 1 and the context's length"
        )
    plans = []
    for length in fitting:
        steps = (Step("prefill", length), Step("decode", tokens))
        if subject.tokenizer_file is not None:
            ids = Tokenizer.from_file(str(subject.tokenizer_file)).encode(TEXT * (2 + length // 40)).ids
            text = partial(_excerpt, tuple(ids), length + tokens)
            plans.append(TracePlan(f"text, prompt of {length}", steps, text))
        drawn = partial(_random_tokens, subject, length + tokens)
        plans.append(TracePlan(f"random ids, prompt of {length}", steps, drawn))
    fitting_turns = [turns for turns in TURNS if sum(step.count for step in turns) <= subject.max_context]
    if fitting_turns:
        turns = fitting_turns[0]
        length = sum(step.count for step in turns)
        plans.append(TracePlan("chunked prefill, second turn", turns, partial(_random_tokens, subject, length)))
    if subject.max_context in WHOLE_CONTEXTS:
        first = 3 * (subject.max_context - tokens) // 4
        rest = subject.max_context - tokens - first
        drawn = partial(_random_tokens, subject, subject.max_context)
        plans.append(
            TracePlan("whole context", (Step("prefill", first), Step("prefill", rest), Step("decode", tokens)), drawn)
        )
    if subject.image is not None and subject.pictures is not None:
        image_plans = _image_plans if subject.image.tokens else _state_image_plans
        plans += image_plans(subject, subject.image, subject.pictures)
    return plans


def _image_plans(subject: Subject, settings: ImageSettings, pictures: Pictures) -> Iterator[TracePlan]:
    block = [*settings.prefix, *[settings.token_id] * settings.tokens, *settings.suffix]
    turn, answer = len(block) + 12, 6
    conversations = (
        ("one image", (1,)),
        ("two images", (2,)),
        ("image in a later turn", (1, 1)),
    )
    for name, images in conversations:
        steps: list[Step] = []
        starts: list[int] = []
        position = 0
        for count in images:
            starts += [position + 3 + index * len(block) for index in range(count)]
            steps += [Step("prefill", turn + (count - 1) * len(block)), Step("decode", answer)]
            position += steps[-2].count + answer
        if position <= subject.max_context:
            tokens = partial(_tokens_with_images, subject, position, tuple(starts), tuple(block))
            yield TracePlan(name, tuple(steps), tokens, pictures(sum(images)), settings.token_id)


def _state_image_plans(subject: Subject, settings: ImageSettings, pictures: Pictures) -> Iterator[TracePlan]:
    """Plan conversations with pictures that take no positions: each is encoded before the prefill of its suffix."""
    block, lead, answer = (*settings.prefix, *settings.suffix), 3, 4
    for name, turns in (("image, second turn", (1, 0)), ("image in a later turn", (0, 1)), ("another image", (1, 1))):
        steps: list[Step] = []
        starts: list[int] = []
        position = 0
        for has_image in turns:
            text = 9
            if has_image:
                before = (lead if position else 0) + len(settings.prefix)
                steps += [Step("prefill", before)] if before else []
                starts.append(position + before - len(settings.prefix))
                position, text = position + before, text + len(settings.suffix)
            steps += [Step("prefill", text), Step("decode", answer)]
            position += text + answer
        if position <= subject.max_context:
            tokens = partial(_tokens_with_images, subject, position, tuple(starts), block)
            yield TracePlan(name, tuple(steps), tokens, pictures(sum(turns)), settings.token_id)


def _tokens_with_images(
    subject: Subject, length: int, starts: tuple[int, ...], block: tuple[int, ...], seed: int
) -> Tensor:
    tokens = _random_tokens(subject, length, seed)
    for start in starts:
        tokens[start : start + len(block)] = torch.tensor(block)
    return tokens


def _random_tokens(subject: Subject, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, subject.vocab_size, (length,), generator=generator)
    if subject.image is not None:
        tokens[tokens == subject.image.token_id] = (subject.image.token_id + 1) % subject.vocab_size
    return tokens


def _kept_tokens(draw: Callable[[int], Tensor], kept: Tensor, choices: Tensor, seed: int) -> Tensor:
    tokens = draw(seed)
    return torch.where(torch.isin(tokens, kept), tokens, choices[tokens % len(choices)])


def _excerpt(ids: tuple[int, ...], length: int, seed: int) -> Tensor:
    return torch.tensor(ids[seed : seed + length])


def _smooth_noise(shape: tuple[int, ...], count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    coarse = [torch.randn((1, shape[-3], 4, 4), generator=generator) for _ in range(count)]
    return tuple(F.interpolate(one, size=shape[-2:], mode="bilinear").expand(shape).contiguous() for one in coarse)
