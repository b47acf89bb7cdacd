import dataclasses

import pytest
import torch

from triptych.errors import ArtifactError, RunError, UsageError
from triptych.manifest import DynamicDim, Manifest, TensorSignature
from triptych.runtime.entry_points import EntryPoints
from triptych.runtime.fake import IMAGE_TOKENS, FakeRunner, fake_manifest
from triptych.runtime.image_prefill import ImagePrefiller
from triptych.runtime.prefill import TextPrefiller, plan_chunks
from triptych.runtime.segments import ImageSegment, Prompt, TextSegment
from triptych.runtime.session import Session
from triptych.runtime.timings import Timings


def image(seed: int) -> ImageSegment:
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return ImageSegment.of(pixels, IMAGE_TOKENS)


PROMPT = Prompt((TextSegment((5, 6, 7)), image(1), TextSegment((8,)), image(2), TextSegment(tuple(range(9, 16)))))


def prefill(
    manifest: Manifest, prompt: Prompt, chunk_size: int | None = None
) -> tuple[torch.Tensor, FakeRunner, Session]:
    runner = FakeRunner(manifest)
    points = EntryPoints.of(manifest)
    session = Session(runner, manifest)
    prefiller = TextPrefiller(points, ImagePrefiller(runner, points), chunk_size)
    return prefiller.prefill(session, prompt, Timings()), runner, session


def test_one_call_for_the_whole_prompt() -> None:
    logits, runner, session = prefill(fake_manifest(), PROMPT)
    assert logits.shape == (1, 32)
    assert [shapes["embeds"] for name, shapes in runner.calls if name == "prefill"] == [(1, 19, 8)]
    assert session.position == 19
    other, _, _ = prefill(fake_manifest(), Prompt((TextSegment((5, 6, 7)), image(3), *PROMPT.segments[2:])))
    assert not torch.allclose(logits, other)  # the comparison can see the picture


@pytest.mark.parametrize("chunk_size", [4, 5, 7, 18, 19, 64])
def test_chunked_equals_parallel(chunk_size: int) -> None:
    expected, _, _ = prefill(fake_manifest(), PROMPT)
    logits, runner, session = prefill(fake_manifest(), PROMPT, chunk_size)
    torch.testing.assert_close(logits, expected)
    sizes = [shapes["embeds"][1] for name, shapes in runner.calls if name == "prefill"]
    assert sum(sizes) == 19
    assert max(sizes) <= chunk_size
    assert session.images[1].start == 8


def test_plan_cuts_text_anywhere_and_pictures_nowhere() -> None:
    plan = plan_chunks(PROMPT.segments, 5)
    assert [sum(part.length for part in chunk) for chunk in plan] == [3, 5, 5, 5, 1]
    assert [part.key for chunk in plan for part in chunk if isinstance(part, ImageSegment)] == [
        image(1).key,
        image(2).key,
    ]
    assert [t for chunk in plan for part in chunk if isinstance(part, TextSegment) for t in part.tokens] == [
        5, 6, 7, 8, *range(9, 16),
    ]  # fmt: skip


def test_a_picture_longer_than_a_chunk_is_refused_before_anything_runs() -> None:
    manifest = fake_manifest()
    runner = FakeRunner(manifest)
    points = EntryPoints.of(manifest)
    prefiller = TextPrefiller(points, ImagePrefiller(runner, points), 3)
    with pytest.raises(RunError, match="image takes 4 positions, a prefill call at most 3"):
        prefiller.prefill(Session(runner, manifest), PROMPT, Timings())
    assert runner.calls == []
    with pytest.raises(UsageError, match="chunk_size is 0"):
        TextPrefiller(points, ImagePrefiller(runner, points), 0)


def test_sequential_where_there_is_no_prefill_method() -> None:
    text = Prompt((TextSegment((5, 6, 7, 8)),))
    expected, _, _ = prefill(fake_manifest(image_token_id=None), text)
    logits, runner, session = prefill(fake_manifest(image_token_id=None, has_prefill=False), text)
    torch.testing.assert_close(logits, expected)
    assert runner.count("decode") == 4
    assert session.tokens == (5, 6, 7, 8)


def test_a_rest_too_short_for_prefill_goes_through_decode() -> None:
    manifest = fake_manifest()
    method = manifest.methods["prefill"]
    embeds = dataclasses.replace(method.inputs[0], shape=(1, DynamicDim("S", 2, 64), 8))
    methods = {**manifest.methods, "prefill": dataclasses.replace(method, inputs=(embeds, method.inputs[1]))}
    text = Prompt((TextSegment((5, 6, 7, 8, 9)),))
    expected, _, _ = prefill(manifest, text)
    logits, runner, _ = prefill(dataclasses.replace(manifest, methods=methods), text, 2)
    torch.testing.assert_close(logits, expected)
    assert (runner.count("prefill"), runner.count("decode")) == (2, 1)


def test_logits_of_every_position_give_the_last() -> None:
    expected, _, _ = prefill(fake_manifest(), PROMPT)
    logits, _, _ = prefill(fake_manifest(all_logits=True), PROMPT)
    assert torch.equal(logits, expected)


def test_extras_are_provided_by_name_or_refused_at_load() -> None:
    manifest = fake_manifest(extras=("position_ids",))
    _, runner, _ = prefill(manifest, PROMPT, 10)
    assert [shapes["position_ids"] for name, shapes in runner.calls if name == "prefill"] == [(1, 8), (1, 10), (1, 1)]
    points = EntryPoints.of(manifest)
    assert points.prefill is not None
    assert points.prefill.extras["position_ids"](7, 3).tolist() == [[7, 8, 9]]
    with pytest.raises(ArtifactError, match="decode takes an input 'deepstack' that this release cannot provide"):
        EntryPoints.of(fake_manifest(extras=("deepstack",)))


def test_equal_pictures_are_encoded_once() -> None:
    again = Prompt((image(1), TextSegment((5,)), image(1), image(2)))
    _, runner, _ = prefill(fake_manifest(), again)
    assert runner.count("vision_encoder") == 2


def test_the_oldest_features_are_dropped() -> None:
    runner = FakeRunner()
    images = ImagePrefiller(runner, EntryPoints.of(runner.manifest), cached_images=2)
    for seed in (1, 2, 1, 3, 1, 2):
        images.features(image(seed))
    assert runner.count("vision_encoder") == 4  # 1, 2, 3, and 2 again
    with pytest.raises(RunError, match="gave 4 embeddings for an image of 5 positions"):
        images.features(ImageSegment.of(torch.zeros(1, 3, 8, 8), 5))


def test_incomplete_artifacts_are_refused_at_load() -> None:
    whole = fake_manifest()
    without = {name: method for name, method in whole.methods.items() if name != "decode"}
    with pytest.raises(ArtifactError, match="no method with the role decode"):
        EntryPoints.of(dataclasses.replace(whole, methods=without))
    without = {name: method for name, method in whole.methods.items() if name != "token_embedding"}
    with pytest.raises(ArtifactError, match="no method has the role token_embedding"):
        EntryPoints.of(dataclasses.replace(whole, methods=without))
    odd = dataclasses.replace(whole.methods["decode"], inputs=(TensorSignature("x", "int64", (1,)),))
    with pytest.raises(ArtifactError, match="expected one of embeds and tokens"):
        EntryPoints.of(dataclasses.replace(whole, methods={**whole.methods, "decode": odd}))


def test_a_picture_that_only_decode_could_take_is_refused_before_anything_runs() -> None:
    manifest = fake_manifest()
    method = manifest.methods["prefill"]
    embeds = dataclasses.replace(method.inputs[0], shape=(1, DynamicDim("S", 5, 7), 8))
    methods = {**manifest.methods, "prefill": dataclasses.replace(method, inputs=(embeds, method.inputs[1]))}
    runner = FakeRunner(dataclasses.replace(manifest, methods=methods))
    points = EntryPoints.of(runner.manifest)
    prefiller = TextPrefiller(points, ImagePrefiller(runner, points))
    with pytest.raises(RunError, match="image of 4 positions cannot be prefilled"):
        prefiller.prefill(Session(runner, runner.manifest), Prompt((TextSegment((5, 6, 7, 8)), image(1))), Timings())
    assert runner.calls == []
