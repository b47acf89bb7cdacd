"""Score the embedded default model on layouts it never saw.

``python -m triptych.demo.evaluate`` asks 1,000 questions about pictures of test layouts, and the same
questions with a blank picture; then the last question of dialogues with two images, with an image in a later
turn, and after a greeting. It runs the checkpoint in transformers, greedily, and counts exact matches. Needs
the extra ``hf``; ``--json FILE`` writes the scores that the model card shows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image

from triptych.demo.dialogues import Question, Turn, asked_questions, dialogue
from triptych.demo.scenes import random_scene, render

CAPTION_SHARE: Final = 0.15
RENDER_SIZES: Final = (32, 64, 256)


@dataclass
class Score:
    """Exact matches by kind."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: str, *, is_right: bool) -> None:
        """Count one answer."""
        self.asked[kind] += 1
        self.right[kind] += is_right

    def to_json(self) -> dict[str, Any]:
        """Return "all" and each kind as right, asked and share."""
        rows = {kind: (self.right[kind], self.asked[kind]) for kind in sorted(self.asked)}
        rows = {"all": (sum(self.right.values()), sum(self.asked.values())), **rows}
        return {kind: {"right": r, "asked": n, "share": round(r / n, 4)} for kind, (r, n) in rows.items()}


class Answerer:
    """The checkpoint in `folder`, answering greedily."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self._processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
        self._model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, turns: list[Turn], pictures: list[Image.Image]) -> str:
        """Answer the last turn, the earlier ones being answered rightly already."""
        messages = []
        for turn in turns:
            content: list[dict[str, str]] = [{"type": "image"} for _ in turn.images]
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        text = self._processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
        inputs = self._processor(text=[text], images=pictures or None, add_special_tokens=False, return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=48, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :]
        return str(self._processor.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def score_questions(answerer: Answerer, count: int, *, blank: bool) -> Score:
    """Ask one question about each of `count` test pictures; `blank` hands over a black picture in its place."""
    rng = random.Random(1)
    score = Score()
    for _ in range(count):
        scene = random_scene(rng, test=True)
        picture = render(scene, rng, size=rng.choice(RENDER_SIZES))
        question: Question = asked_questions(scene, rng, 1, caption_share=CAPTION_SHARE)[0]
        if blank:
            picture = Image.new("RGB", picture.size)
        turn = Turn(question.kind, question.text, question.answer, (scene,))
        score.add(question.kind, is_right=answerer.answer([turn], [picture]) == question.answer)
    return score


def score_dialogues(answerer: Answerer, count: int) -> Score:
    """Ask the last question of `count` test dialogues; the kind says where the images stand."""
    rng = random.Random(2)
    score = Score()
    for _ in range(count):
        turns = dialogue(rng, test=True)
        pictures = [render(scene, rng, size=rng.choice(RENDER_SIZES)) for turn in turns for scene in turn.images]
        by_turn = [len(turn.images) for turn in turns]
        kind = {1: "one image", 2: "two images in one turn"}.get(by_turn[0], "image after a greeting")
        if by_turn[0] == 1 and len(pictures) == 2:
            kind = "second image in a later turn"
        score.add(kind, is_right=answerer.answer(turns, pictures) == turns[-1].answer)
    return score


def evaluate(folder: Path, questions: int, dialogues: int) -> dict[str, Any]:
    """Return all scores of the checkpoint in `folder`."""
    answerer = Answerer(folder)
    return {
        "questions": score_questions(answerer, questions, blank=False).to_json(),
        "questions with a blank picture": score_questions(answerer, questions, blank=True).to_json(),
        "dialogues": score_dialogues(answerer, dialogues).to_json(),
    }


def main() -> None:
    """Parse the command line, score, print."""
    parser = argparse.ArgumentParser(description="Score the embedded default model on test layouts.")
    parser.add_argument("--model", type=Path, default=None, help="checkpoint folder (default: the embedded one)")
    parser.add_argument("--questions", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--dialogues", type=int, default=400, help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=None, help="file that receives the scores")
    options = parser.parse_args()
    if options.model is not None:
        scores = evaluate(options.model, options.questions, options.dialogues)
    else:
        with as_file(files("triptych.demo").joinpath("model")) as folder:
            scores = evaluate(folder, options.questions, options.dialogues)
    for name, rows in scores.items():
        print(name)
        for kind, row in rows.items():
            print(f"  {kind}: {row['right']}/{row['asked']} = {100 * row['share']:.1f} %")
    if options.json is not None:
        options.json.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
