"""The generator of scenes and dialogues, and the embedded model itself."""

import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from triptych.demo.dialogues import caption, dialogue, questions
from triptych.demo.evaluate import Answerer, score_questions
from triptych.demo.scenes import CELLS, COLORS, SHAPES, Item, Scene, random_scene, render
from triptych.demo.train import build_processor, encode_dialogue, train_tokenizer


def test_training_and_test_layouts_never_meet() -> None:
    rng = random.Random(0)
    training = {random_scene(rng, test=False) for _ in range(2000)}
    test = {random_scene(rng, test=True) for _ in range(2000)}
    assert not training & test
    assert all(scene.is_test for scene in test)
    layouts = [Scene((Item(0, color, shape),)) for color in COLORS for shape in SHAPES]
    assert 0 < sum(scene.is_test for scene in layouts) < len(layouts)


def test_dialogues_of_a_side_show_only_its_layouts() -> None:
    rng = random.Random(1)
    for test in (False, True):
        shown = [scene for _ in range(200) for turn in dialogue(rng, test=test) for scene in turn.images]
        assert {scene.is_test for scene in shown} == {test}


def test_dialogues_have_two_images_and_images_in_later_turns() -> None:
    rng = random.Random(2)
    counts = [[len(turn.images) for turn in dialogue(rng, test=False)] for _ in range(300)]
    assert any(row[0] == 2 for row in counts)
    assert any(row[0] == 1 and 1 in row[1:] for row in counts)
    assert any(row[0] == 0 and 1 in row[1:] for row in counts)


def test_answers_are_right_about_a_scene_counted_by_hand() -> None:
    scene = Scene((Item(0, "red", "circle"), Item(3, "blue", "cross")))
    answers = {question.text: question.answer for question in questions(scene, random.Random(0))}
    assert answers["what color is the circle?"] == "red"
    assert answers["where is the cross?"] == "bottom right"
    assert answers["what shape is blue?"] == "cross"
    assert answers["what is in the top right?"] == "nothing"
    assert answers["how many objects are there?"] == "two"
    assert caption(scene) == "a red circle in the top left and a blue cross in the bottom right"


@pytest.mark.parametrize("cell", range(4))
def test_a_shape_is_drawn_in_its_cell(cell: int) -> None:
    picture = render(Scene((Item(cell, "white", "square"),)), random.Random(0), size=64)
    brightest = picture.convert("L").resize((2, 2), Image.Resampling.BOX)
    values = list(brightest.tobytes())
    assert values.index(max(values)) == cell
    assert len(CELLS) == len(values)


def test_rendering_is_repeatable_and_noisy() -> None:
    scene = Scene((Item(1, "green", "triangle"),))
    first, again, other = (render(scene, random.Random(seed), size=48) for seed in (5, 5, 6))
    assert ImageChops.difference(first, again).getbbox() is None
    assert ImageChops.difference(first, other).getbbox() is not None


def test_training_tokens_are_those_of_the_chat_template() -> None:
    tokenizer = train_tokenizer()
    processor = build_processor(tokenizer)
    rng = random.Random(3)
    for _ in range(50):
        turns = dialogue(rng, test=False)
        messages = []
        for turn in turns:
            parts = [{"type": "image"} for _ in turn.images] + [{"type": "text", "text": turn.text}]
            messages.append({"role": "user", "content": parts})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        text = processor.apply_chat_template(messages).replace("<image>", "<image>" * 16)
        assert encode_dialogue(tokenizer, turns)[0] == tokenizer.encode(text, add_special_tokens=False).ids


def test_the_embedded_model_answers_and_needs_the_picture(demo_checkpoint: Path) -> None:
    answerer = Answerer(demo_checkpoint)
    seen = score_questions(answerer, 40, blank=False).to_json()["all"]["share"]
    blank = score_questions(answerer, 40, blank=True).to_json()["all"]["share"]
    assert seen >= 0.95
    assert blank <= 0.6
