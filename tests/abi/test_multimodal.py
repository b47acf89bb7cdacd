"""`MultimodalRunner` of ExecuTorch over the embedded model: the answers about pictures that transformers gives."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

import triptych
from tests.abi.executorch_runner import Answer, Input, Request, answers
from tests.conftest import DEMO_CONTEXT
from triptych.compiler.model import Model
from triptych.demo.dialogues import CAPTION_QUESTION, Question, Turn, asked_questions
from triptych.demo.evaluate import Answerer
from triptych.demo.scenes import random_scene, render
from triptych.manifest import Manifest
from triptych.runtime.chat import render_chat
from triptych.runtime.images import preprocess
from triptych.verification import verify

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Asked:
    """A question about pictures in one turn, and the right answer."""

    question: Question
    pictures: tuple[Image.Image, ...]
    turn: Turn


def asked(seed: int, kind: str, images: int = 1) -> Asked:
    """Draw pictures of test scenes and a question of this kind about the last of them."""
    rng = random.Random(seed)
    scenes = tuple(random_scene(rng, test=True) for _ in range(images))
    pictures = tuple(render(scene, rng, size=256) for scene in scenes)
    share = 1.0 if kind == "caption" else 0.0
    pool = asked_questions(scenes[-1], rng, 20, caption_share=share)
    question = next(one for one in pool if one.kind == kind)
    reference = "in the second image, " if images == 2 else ""
    return Asked(question, pictures, Turn(kind, reference + question.text, question.answer, scenes))


ASKED = (
    asked(3, "color"),
    asked(3, "count"),
    asked(4, "caption"),
    asked(5, "caption"),
    asked(6, "place"),
    asked(7, "color", images=2),
)


def request(manifest: Manifest, one: Asked) -> Request:
    """Put the pictures where the chat template has their placeholders, as an app would."""
    assert manifest.image is not None
    parts = [{"type": "image"} for _ in one.pictures] + [{"type": "text", "text": one.turn.text}]
    texts = render_chat([{"role": "user", "content": parts}], manifest.chat).split(manifest.image.token)
    port = manifest.methods["vision_encoder"].input("pixel_values")
    inputs: list[Input] = [texts[0]]
    for picture, text in zip(one.pictures, texts[1:], strict=True):
        inputs += [preprocess(picture, manifest.image, port), *([text] if text else [])]
    return Request(tuple(inputs))


@pytest.fixture(scope="module")
def answered(demo_pte: Path) -> list[Answer]:
    manifest = Manifest.load(demo_pte)
    half = "what color is the circle? " * 25  # 153 tokens
    over_long = [Request((2 * half,)), Request((half, half))]
    again = request(manifest, ASKED[0])
    return list(answers("multimodal", demo_pte, [*(request(manifest, one) for one in ASKED), *over_long, again]))


def test_the_answers_are_those_of_transformers(answered: list[Answer], demo_checkpoint: Path) -> None:
    answerer = Answerer(demo_checkpoint)
    expected = [answerer.answer([one.turn], list(one.pictures)) for one in ASKED]
    assert [one.text.removesuffix("</s>").strip() for one in answered[: len(ASKED)]] == expected
    assert sum(text == one.question.answer for text, one in zip(expected, ASKED, strict=True)) >= len(ASKED) - 1
    captions = [text for text, one in zip(expected, ASKED, strict=True) if one.turn.text == CAPTION_QUESTION]
    assert len(set(captions)) == 2, "other pictures, other captions"


def test_it_ends_at_the_end_of_text(answered: list[Answer]) -> None:
    assert [one.pieces.index("</s>") for one in answered[: len(ASKED)]] == [
        len(one.pieces) - 1 for one in answered[: len(ASKED)]
    ]


def test_our_runtime_gives_the_same_answers_from_the_same_file(demo_pte: Path, answered: list[Answer]) -> None:
    with triptych.load(demo_pte) as runner:
        for one, answer in zip(ASKED, answered, strict=False):
            result = runner.generate(one.turn.text, list(one.pictures), max_new_tokens=48)
            assert (result.text, result.finish_reason) == (answer.text.removesuffix("</s>"), "eos")
            assert result.prompt_tokens == answer.prompt_tokens


def test_a_prompt_past_the_context_is_an_error_and_the_runner_goes_on(answered: list[Answer]) -> None:
    *too_long, again = answered[len(ASKED) :]
    assert [(one.error, one.pieces) for one in too_long] == [("Generation failed", ())] * 2
    assert again.pieces == answered[0].pieces


def test_parity_of_the_emitted_file(demo_pte: Path, demo_model: Model) -> None:
    report = verify(demo_pte, demo_model, tokens=8, prompt_lengths=(1, 17))
    assert report.passed, [(one.trace, one.failures, one.unseen) for one in report.traces]
    assert {one.trace for one in report.traces} >= {"one image", "two images", "image in a later turn"}
    assert Manifest.load(demo_pte).max_context == DEMO_CONTEXT
