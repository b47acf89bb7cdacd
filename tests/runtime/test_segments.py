import dataclasses
from pathlib import Path

import pytest
import torch

from triptych.errors import RunError
from triptych.runtime.fake import fake_manifest
from triptych.runtime.segments import ImageSegment, TextSegment, build_prompt
from triptych.runtime.tokenizers import Tokenizer, load_tokenizer

SETTINGS = dataclasses.replace(fake_manifest().image, prefix=(10,), suffix=(11, 12))  # type: ignore[type-var]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file, bos_id=1)


def test_placeholders_become_pictures_between_prefix_and_suffix(tokenizer: Tokenizer) -> None:
    first, second = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    prompt = build_prompt("a<image><image>b", [first, second], tokenizer, SETTINGS, bos=True)
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    kinds = [part.tokens if isinstance(part, TextSegment) else part.pixel_values for part in prompt.segments]
    assert [kind for kind in kinds if isinstance(kind, tuple)] == [(1, a, 10), (11, 12, 10), (11, 12, b)]
    assert kinds[1] is first
    assert kinds[3] is second
    assert prompt.length == 3 + 4 + 3 + 4 + 3


def test_equal_pixels_have_equal_keys() -> None:
    pixels = torch.rand(1, 3, 8, 8)
    changed = pixels.clone()
    changed[0, 0, 0, 0] += 1e-6
    key = ImageSegment.of(pixels, 4).key
    assert ImageSegment.of(pixels.clone(), 4).key == key
    assert ImageSegment.of(changed, 4).key != key
    assert ImageSegment.of(pixels.reshape(1, 3, 4, 16), 4).key != key


@pytest.mark.parametrize(("text", "pictures"), [("a", 1), ("<image>a", 0), ("<image><image>", 1)])
def test_counts_must_agree(tokenizer: Tokenizer, text: str, pictures: int) -> None:
    message = rf"{text.count('<image>')} placeholder\(s\) <image> and {pictures} image\(s\)"
    with pytest.raises(RunError, match=message):
        build_prompt(text, [torch.zeros(1, 3, 8, 8)] * pictures, tokenizer, SETTINGS)


def test_empty_and_text_only(tokenizer: Tokenizer) -> None:
    with pytest.raises(RunError, match="prompt is empty"):
        build_prompt("", [], tokenizer, SETTINGS)
    with pytest.raises(RunError, match="text-only"):
        build_prompt("a", [torch.zeros(1)], tokenizer, None)
    assert build_prompt("<image>", [], tokenizer, None).segments == (TextSegment((3,)),)
