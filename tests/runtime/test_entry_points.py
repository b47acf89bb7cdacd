"""Methods that take tokens, that begin at position 0, that choose: what the runtime makes of each."""

from dataclasses import replace

import pytest
import torch

from triptych.errors import ArtifactError, UsageError
from triptych.manifest import Manifest, MethodSignature, token_text
from triptych.runtime.entry_points import EntryPoints
from triptych.runtime.fake import FakeRunner, fake_manifest
from triptych.runtime.generation import SamplingSettings, TextDecoder, TextTokenGenerator
from triptych.runtime.image_prefill import ImagePrefiller
from triptych.runtime.prefill import TextPrefiller
from triptych.runtime.sampling import Sampler
from triptych.runtime.segments import Prompt, TextSegment
from triptych.runtime.session import Session
from triptych.runtime.timings import Timings

TOKENS = (5, 6, 7, 8, 9)


def answer(manifest: Manifest, chunk_size: int | None = None) -> tuple[list[int], list[str]]:
    """Return four generated tokens, and the methods that were called up to the first of them."""
    runner = FakeRunner(manifest)
    points = EntryPoints.of(manifest)
    session = Session(runner, manifest)
    prefiller = TextPrefiller(points, ImagePrefiller(runner, points), chunk_size)
    logits = prefiller.prefill(session, Prompt((TextSegment(TOKENS),)), Timings())
    called = [name for name, _ in runner.calls]
    generator = TextTokenGenerator(TextDecoder(points), Sampler(), ())
    return list(generator.generate(session, logits, 4, SamplingSettings(), Timings())), called


def text_only(**options: object) -> Manifest:
    return fake_manifest(image_token_id=None, **options)  # type: ignore[arg-type]


def test_every_form_of_the_methods_gives_the_same_answer() -> None:
    wanted, called = answer(text_only())
    assert called == ["token_embedding", "prefill"]
    assert answer(text_only(prefill_content="tokens")) == (wanted, ["prefill"])
    assert answer(text_only(chooses_tokens=True))[0] == wanted
    assert answer(text_only(has_prefill_first=True)) == (wanted, ["token_embedding", "prefill_first"])
    chunked, called = answer(text_only(has_prefill_first=True, prefill_content="tokens"), chunk_size=2)
    assert (chunked, called) == (wanted, ["prefill_first", "prefill", "prefill"])
    assert answer(text_only(has_prefill=False, chooses_tokens=True))[0] == wanted


def test_a_second_turn_and_a_chunk_of_another_length_go_to_prefill() -> None:
    manifest = text_only(has_prefill_first=True, prefill_content="tokens")
    first = manifest.methods["prefill_first"]
    five = replace(first, inputs=(replace(first.inputs[0], shape=(1, 5)),))
    manifest = replace(manifest, methods={**manifest.methods, "prefill_first": five})
    runner, points = FakeRunner(manifest), EntryPoints.of(manifest)
    session, prefiller = Session(runner, manifest), TextPrefiller(points, ImagePrefiller(runner, points))
    for tokens in ((1, 2), TOKENS):
        prefiller.prefill(session, Prompt((TextSegment(tokens),)), Timings())
    session.reset()
    prefiller.prefill(session, Prompt((TextSegment(TOKENS),)), Timings())
    assert [name for name, _ in runner.calls] == ["prefill", "prefill", "prefill_first"]


def test_what_chooses_tokens_cannot_sample() -> None:
    manifest = text_only(chooses_tokens=True)
    points = EntryPoints.of(manifest)
    assert points.chooses_tokens
    generator = TextTokenGenerator(TextDecoder(points), Sampler(), ())
    session = Session(FakeRunner(manifest), manifest)
    with pytest.raises(
        UsageError, match=r"temperature is 0\.5, and the method decode of this artifact chooses the most"
    ):
        generator.generate(session, torch.zeros(1, 32), 1, SamplingSettings(temperature=0.5), Timings())


def test_a_first_prefill_that_does_not_fit_the_other_is_refused() -> None:
    manifest = text_only(has_prefill_first=True)
    first, prefill = manifest.methods["prefill_first"], manifest.methods["prefill"]
    with_position = replace(first, inputs=prefill.inputs)
    for methods in (
        {**manifest.methods, "prefill_first": with_position},
        {name: method for name, method in manifest.methods.items() if name != "prefill"},
        {
            **manifest.methods,
            "prefill": MethodSignature(("prefill",), manifest.methods["decode"].inputs, first.outputs),
        },
    ):
        with pytest.raises(
            ArtifactError, match="prefill_first has the role prefill_first; expected no start_pos, and a"
        ):
            EntryPoints.of(replace(manifest, methods=methods))


def test_kept_tokens_are_written_only_where_there_are_any() -> None:
    manifest = text_only()
    assert "kept_tokens" not in manifest.to_json(), "releases that do not know the field read this"
    pruned = replace(manifest, kept_tokens=token_text([1, 2, 9]))
    assert Manifest.from_json(pruned.to_json()).kept_tokens == "1-2,9"
    assert Manifest.from_json(manifest.to_json()).kept_tokens is None
