import dataclasses

import pytest
import torch

from triptych.errors import RunError
from triptych.manifest import StateRow
from triptych.runtime.entry_points import EntryPoints
from triptych.runtime.fake import IMAGE_TOKENS, STATE_ROW, FakeRunner, fake_manifest
from triptych.runtime.generation import TextDecoder
from triptych.runtime.image_prefill import ImagePrefiller
from triptych.runtime.prefill import TextPrefiller
from triptych.runtime.segments import ImageSegment, Prompt, TextSegment
from triptych.runtime.session import Session
from triptych.runtime.timings import Timings


def make(runner: FakeRunner) -> tuple[Session, TextPrefiller, TextDecoder]:
    points = EntryPoints.of(runner.manifest)
    return Session(runner, runner.manifest), TextPrefiller(points, ImagePrefiller(runner, points)), TextDecoder(points)


def test_records_tokens_and_pictures() -> None:
    session, prefiller, decoder = make(FakeRunner())
    image = ImageSegment.of(torch.rand(1, 3, 8, 8), IMAGE_TOKENS)
    prefiller.prefill(session, Prompt((TextSegment((5, 6)), image, TextSegment((7,)))), Timings())
    decoder.step(session, 9)
    assert session.tokens == (5, 6, 3, 3, 3, 3, 7, 9)
    assert [(span.start, span.length, span.key) for span in session.images] == [(2, IMAGE_TOKENS, image.key)]
    assert session.room == 64 - 8


def test_truncate_then_continue_equals_never_having_gone_on() -> None:
    session, prefiller, decoder = make(FakeRunner())
    prefiller.prefill(session, Prompt((TextSegment((5, 6)),)), Timings())
    expected = decoder.step(session, 9)
    for token in (10, 11, 12):
        decoder.step(session, token)
    session.truncate(2)
    assert session.tokens == (5, 6)
    assert torch.equal(decoder.step(session, 9), expected)


def test_truncate_refuses_what_it_cannot_do() -> None:
    runner = FakeRunner()
    session, prefiller, _ = make(runner)
    image = ImageSegment.of(torch.rand(1, 3, 8, 8), IMAGE_TOKENS)
    prefiller.prefill(session, Prompt((TextSegment((5, 6)), image)), Timings())
    with pytest.raises(RunError, match="inside the image at 2 to 6"):
        session.truncate(4)
    with pytest.raises(RunError, match="cannot truncate to position 7"):
        session.truncate(7)
    session.truncate(2)
    assert session.images == ()
    row = StateRow("recurrent", (1, 4), "float32", "BC", "zeros", "fake.program", ("decode",), ("decode",))
    recurrent = Session(runner, dataclasses.replace(runner.manifest, state=(*runner.manifest.state, row)))
    recurrent.append(TextSegment((1, 2)))
    with pytest.raises(RunError, match="state row recurrent has no slots"):
        recurrent.truncate(1)


def test_reset_gives_a_fresh_session_without_a_load() -> None:
    runner = FakeRunner()
    session, prefiller, _ = make(runner)
    expected = prefiller.prefill(session, Prompt((TextSegment((5, 6, 7)),)), Timings())
    session.reset()
    assert (session.position, session.images) == (0, ())
    assert not runner.state[STATE_ROW].any()
    assert torch.equal(prefiller.prefill(session, Prompt((TextSegment((5, 6, 7)),)), Timings()), expected)


def test_a_prompt_past_the_context_leaves_the_session_usable() -> None:
    runner = FakeRunner(fake_manifest(max_context=8))
    session, prefiller, decoder = make(runner)
    prefiller.prefill(session, Prompt((TextSegment((5,) * 6),)), Timings())
    ran = len(runner.calls)
    with pytest.raises(RunError, match="takes 3 positions after the 6 already there, the context holds 8; shorten it"):
        prefiller.prefill(session, Prompt((TextSegment((5,) * 3),)), Timings())
    assert len(runner.calls) == ran
    decoder.step(session, 5)
    decoder.step(session, 5)
    with pytest.raises(RunError, match="the context holds 8"):
        decoder.step(session, 5)
    assert session.position == 8
