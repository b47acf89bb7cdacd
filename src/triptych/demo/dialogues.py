"""Questions and answers about scenes, one dialogue a training example.

Four kinds of dialogue are drawn: one picture and several questions; two pictures in one turn; a second
picture in a later turn; a greeting before the first picture. Where two pictures were shown, "in the first
image" and "in the second image" say which is meant; a question without such words is about the latest one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from triptych.demo.scenes import CELLS, COLORS, SHAPES, Scene, random_scene

COUNTS: Final = ("zero", "one", "two", "three", "four")
CAPTION_QUESTION: Final = "describe the image."
GREETINGS: Final = (
    ("hello.", "hello, show me an image."),
    ("who are you?", "a model that answers questions about shapes."),
    ("what can you do?", "name the color, shape and place of objects."),
)


@dataclass(frozen=True)
class Question:
    """A question about one scene with its only right answer; `kind` groups the scores."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Turn:
    """What the user says, after `images` new pictures, and the answer. `kind` groups the scores."""

    kind: str
    text: str
    answer: str
    images: tuple[Scene, ...] = ()


def caption(scene: Scene) -> str:
    """Describe every item of `scene`, cell by cell."""
    return " and ".join(f"a {item.color} {item.shape} in the {CELLS[item.cell]}" for item in scene.items)


def questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Return the questions `scene` answers without doubt, shuffled; the caption is not among them."""
    shapes = [item.shape for item in scene.items]
    colors = [item.color for item in scene.items]
    found: list[Question] = []
    for item in scene.items:
        if shapes.count(item.shape) == 1:
            found.append(Question("color", f"what color is the {item.shape}?", item.color))
            found.append(Question("place", f"where is the {item.shape}?", CELLS[item.cell]))
        if colors.count(item.color) == 1:
            found.append(Question("shape", f"what shape is {item.color}?", item.shape))
    for cell, name in enumerate(CELLS):
        occupant = scene.at(cell)
        answer = f"a {occupant.color} {occupant.shape}" if occupant else "nothing"
        found.append(Question("cell", f"what is in the {name}?", answer))
    found.append(Question("count", "how many objects are there?", COUNTS[len(scene.items)]))
    present = rng.choice(scene.items)
    found.append(Question("presence", f"is there a {present.color} {present.shape}?", "yes"))
    color, shape = rng.choice(list(COLORS)), rng.choice(SHAPES)
    is_there = any((item.color, item.shape) == (color, shape) for item in scene.items)
    found.append(Question("presence", f"is there a {color} {shape}?", "yes" if is_there else "no"))
    rng.shuffle(found)
    return found


def asked_questions(scene: Scene, rng: random.Random, count: int, *, caption_share: float) -> list[Question]:
    """Draw `count` questions about `scene`; each is the caption with probability `caption_share`."""
    drawn = questions(scene, rng)[:count]
    return [
        Question("caption", CAPTION_QUESTION, caption(scene)) if rng.random() < caption_share else question
        for question in drawn
    ]


def dialogue(rng: random.Random, *, test: bool, caption_share: float = 0.12) -> list[Turn]:
    """Draw one dialogue over scenes of one side of the split."""
    kind = rng.choices(("single", "two-images", "later-image", "greeting"), weights=(50, 20, 20, 10))[0]
    first = random_scene(rng, test=test)
    if kind in ("single", "greeting"):
        turns = _turns((first,), [("", q) for q in asked_questions(first, rng, 4, caption_share=caption_share)])
        if kind == "single":
            return turns
        text, answer = rng.choice(GREETINGS)
        return [Turn("greeting", text, answer), *turns]
    second = random_scene(rng, test=test)
    scenes: Mapping[str, Scene] = {"in the first image, ": first, "in the second image, ": second, "": second}
    if kind == "two-images":
        return _turns((first, second), _asked(scenes, rng, 4, caption_share))
    opening = _turns((first,), [("", q) for q in asked_questions(first, rng, 2, caption_share=caption_share)])
    return opening + _turns((second,), _asked(scenes, rng, 3, caption_share))


def _asked(
    scenes: Mapping[str, Scene], rng: random.Random, count: int, caption_share: float
) -> list[tuple[str, Question]]:
    references = rng.choices(list(scenes), weights=(2, 2, 1), k=count)
    return [
        (reference, asked_questions(scenes[reference], rng, 1, caption_share=caption_share)[0])
        for reference in references
    ]


def _turns(images: tuple[Scene, ...], asked: list[tuple[str, Question]]) -> list[Turn]:
    return [
        Turn(question.kind, reference + question.text, question.answer, images if index == 0 else ())
        for index, (reference, question) in enumerate(asked)
    ]
