"""The demonstration: export the embedded model, draw a test picture, ask about it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from triptych.api import export, load
from triptych.demo.dialogues import CAPTION_QUESTION, caption, questions
from triptych.demo.scenes import Scene, render, scenes

MODEL_FOLDER: Final = "model"
QUESTION_KINDS: Final = ("color", "count")


@dataclass(frozen=True)
class Asked:
    """One question with the model's answer and the right one; speed as the runner measured it."""

    question: str
    answer: str
    expected: str
    seconds_to_first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Demonstration:
    """Where the picture and the artifact lie, and what was asked."""

    picture: Path
    artifact: Path
    asked: tuple[Asked, ...]


def show(out: Path, *, target: str, recipe: str, seed: int, report: Callable[[str], None]) -> Demonstration:
    """Export into `out`, draw a picture of a test layout, and ask three questions about it."""
    with as_file(files("triptych.demo").joinpath(MODEL_FOLDER)) as model:
        artifact = export(model, out=out / "artifact", target=target, recipe=recipe, progress=report)
    report("answer")
    rng = random.Random(seed)
    scene = _scene(seed)
    picture = out / "picture.png"
    render(scene, rng, size=256).save(picture)
    asked = []
    with load(artifact.path) as runner:
        for question, expected in _asked(scene, rng):
            result = runner.generate(question, [picture], max_new_tokens=48)
            asked.append(
                Asked(
                    question,
                    result.text.strip(),
                    expected,
                    result.timings.first_token,
                    result.decode_tokens_per_second,
                )
            )
    return Demonstration(picture, artifact.path, tuple(asked))


def _scene(seed: int) -> Scene:
    """Return the first scene of the seed's stream with three items that can each be asked for."""
    for scene in scenes(seed, test=True):
        if len(scene.items) == 3 and len({item.shape for item in scene.items}) == 3:
            return scene
    raise AssertionError("the stream of scenes is endless")


def _asked(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    pool = questions(scene, rng)
    chosen = [next(question for question in pool if question.kind == kind) for kind in QUESTION_KINDS]
    return [*((question.text, question.answer) for question in chosen), (CAPTION_QUESTION, caption(scene))]
