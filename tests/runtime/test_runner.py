import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import processors

from triptych.errors import ArtifactError, RunError, UsageError
from triptych.runtime.fake import FakeRunner
from triptych.runtime.runner import MultimodalRunner, Runner, TextRunner

Make = Callable[..., Path]


def picture(red: int) -> Image.Image:
    return Image.new("RGB", (20, 10), (red, 0, 0))


def test_text_generation_equals_plain_stepping(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact(image_token_id=None))
    assert isinstance(runner, TextRunner)
    result = runner.generate("a red circle", max_new_tokens=6)
    reference = FakeRunner(runner.manifest)
    ids = runner.tokenizer.encode("user: a red circle assistant:")
    assert result.prompt_tokens == len(ids)
    expected: list[int] = []
    for position, token in enumerate([*ids, *[None] * 5]):
        chosen = expected[-1] if token is None else token
        step = {"tokens": torch.tensor([[chosen]]), "start_pos": torch.tensor([position])}
        logits = reference.run("decode", **step)["logits"]
        if position >= len(ids) - 1:
            expected.append(int(logits.argmax()))
    assert list(result.tokens) == expected
    assert result.finish_reason == "length"
    assert result.text == runner.tokenizer.decode(expected)


def test_stream_gives_the_same_text_in_pieces(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact())
    heard: list[str] = []
    whole = runner.generate("what?", [picture(9)], max_new_tokens=8, on_text=heard.append)
    stream = runner.stream("what?", [picture(9)], max_new_tokens=8)
    with pytest.raises(RunError, match="has not ended"):
        _ = stream.result
    assert "".join(stream) == whole.text == "".join(heard)
    assert stream.result.tokens == whole.tokens
    assert all(heard)


def test_pictures_change_the_answer_and_are_encoded_once(make_artifact: Make, fake_engine: list[FakeRunner]) -> None:
    runner = Runner.from_pretrained(make_artifact())
    assert isinstance(runner, MultimodalRunner)
    first = runner.generate("what?", [picture(0)], max_new_tokens=4)
    again = runner.generate("what?", [picture(0)], max_new_tokens=4)
    assert again.tokens == first.tokens
    assert fake_engine[0].count("vision_encoder") == 1
    other = runner.generate("what?", [picture(255)], max_new_tokens=4)
    assert fake_engine[0].count("vision_encoder") == 2
    assert other.tokens != first.tokens


def test_chunk_size_changes_the_calls_and_not_the_tokens(make_artifact: Make, fake_engine: list[FakeRunner]) -> None:
    folder = make_artifact()
    whole = Runner.from_pretrained(folder).generate("what?", [picture(1)], max_new_tokens=4)
    chunked = Runner.from_pretrained(folder, chunk_size=4).generate("what?", [picture(1)], max_new_tokens=4)
    assert chunked.tokens == whole.tokens
    assert fake_engine[0].count("prefill") == 1 < fake_engine[1].count("prefill")


def test_stops_at_eos_and_leaves_it_out(make_artifact: Make) -> None:
    folder = make_artifact()
    free = Runner.from_pretrained(folder).generate("what?", max_new_tokens=5)
    stop = free.tokens[2]
    cut = list(free.tokens).index(stop)
    result = Runner.from_pretrained(make_artifact(eos_ids=(stop,))).generate("what?", max_new_tokens=5)
    assert (result.tokens, result.finish_reason) == (free.tokens[:cut], "eos")


def test_generates_until_the_context_is_full(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact(template=None, image_token_id=None, max_context=10))
    length = len(runner.tokenizer.encode("a red"))
    result = runner.generate("a red", max_new_tokens=1000)
    assert result.finish_reason == "context"
    assert len(result.tokens) == 10 - length + 1  # the last one is sampled and needs no position
    with pytest.raises(RunError, match="the context holds 10; shorten it"):
        runner.generate("a red circle and a blue square, and again a red circle, one two three")
    assert runner.generate("a red", max_new_tokens=1000).tokens == result.tokens  # still usable


def test_refused_input_leaves_the_runner_usable(make_artifact: Make, tmp_path: Path) -> None:
    runner = Runner.from_pretrained(make_artifact())
    expected = runner.generate("what?", [picture(3)], max_new_tokens=3).tokens
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(RunError, match="no image"):
        runner.generate("what?", [tmp_path / "bad.png"])
    with pytest.raises(RunError, match=r"2 placeholder\(s\) <image> and 1 image"):
        runner.generate("<image>?", [picture(1)])
    with pytest.raises(UsageError, match="max_new_tokens is 0"):
        runner.generate("what?", max_new_tokens=0)
    with pytest.raises(UsageError, match="top_p is 7"):
        runner.generate("what?", top_p=7)
    with pytest.raises(UsageError, match=r"images is 'a\.png'; expected a list"):
        runner.generate("what?", "a.png")
    assert runner.generate("what?", [picture(3)], max_new_tokens=3).tokens == expected


def test_an_image_for_a_text_only_artifact(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact(image_token_id=None))
    with pytest.raises(RunError, match=r"1 image\(s\) given, but this artifact takes text only"):
        runner.generate("what?", [picture(3)])


def test_chat_takes_whole_conversations(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact())
    parts = [{"type": "image", "image": picture(5)}, {"type": "text", "text": "what?"}]
    single = runner.chat([{"role": "user", "content": parts}], max_new_tokens=4)
    assert single.tokens == runner.generate("what?", [picture(5)], max_new_tokens=4).tokens
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "?"},
    ]
    assert runner.chat(turns, max_new_tokens=4).prompt_tokens > single.prompt_tokens


def test_plain_prompts_carry_no_template(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact())
    plain = runner.generate("what?", [picture(5)], chat=False, max_new_tokens=2)
    assert plain.prompt_tokens == len(runner.tokenizer.encode("what?")) + 4
    placed = runner.generate("wh<image>at?", [picture(5)], chat=False, max_new_tokens=2)
    assert placed.prompt_tokens == len(runner.tokenizer.encode("wh")) + len(runner.tokenizer.encode("at?")) + 4


def test_a_seed_repeats_the_text(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact())

    def tokens(seed: int) -> tuple[int, ...]:
        return runner.generate("what?", temperature=3.0, seed=seed, max_new_tokens=10).tokens

    assert tokens(1) == tokens(1) != tokens(2)


def test_timings_say_where_the_time_went(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact())
    result = runner.generate("what?", [picture(5)], max_new_tokens=5)
    timings = dataclasses.asdict(result.timings)
    assert all(seconds > 0 for seconds in timings.values())
    before = sum(timings[phase] for phase in ("tokenize", "vision", "embed", "prefill"))
    assert timings["first_token"] >= before
    assert result.decode_tokens_per_second == pytest.approx(4 / (timings["decode"] + timings["sample"]))
    assert result.prefill_tokens_per_second > 0


def test_broken_artifacts(make_artifact: Make, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the folder does not exist"):
        Runner.from_pretrained(tmp_path / "absent")
    folder = make_artifact()
    manifest = (folder / "triptych.json").read_text()
    (folder / "triptych.json").write_text(manifest.replace('"tokenizer": "tokenizer.json"', '"tokenizer": null'))
    with pytest.raises(ArtifactError, match="has no tokenizer"):
        Runner.from_pretrained(folder)


def test_files_are_verified_unless_told_otherwise(make_artifact: Make) -> None:
    folder = make_artifact()
    manifest = (folder / "triptych.json").read_text()
    record = '"files": {"fake.program": {"sha256": "0", "bytes": 0}}'
    (folder / "triptych.json").write_text(manifest.replace('"files": {}', record))
    with pytest.raises(ArtifactError, match="does not have the sha256"):
        Runner.from_pretrained(folder)
    with Runner.from_pretrained(folder, verify_files=False) as runner:
        assert runner.generate("what?", max_new_tokens=1).tokens
    with pytest.raises(RunError, match="closed"):
        runner.generate("what?")


def test_another_abi_is_refused(make_artifact: Make) -> None:
    folder = make_artifact()
    manifest = (folder / "triptych.json").read_text()
    (folder / "triptych.json").write_text(manifest.replace('"abi": "triptych/1"', '"abi": "executorch-llm"'))
    with pytest.raises(ArtifactError, match="keeps the ABI 'executorch-llm'"):
        Runner.from_pretrained(folder)


def test_a_second_generation_ends_the_first_with_an_error(make_artifact: Make) -> None:
    runner = Runner.from_pretrained(make_artifact())
    first = runner.stream("what?", max_new_tokens=30)
    runner.generate("what?", max_new_tokens=2)
    with pytest.raises(RunError, match="another one has reset its session"):
        list(first)


def test_bos_goes_before_plain_prompts_where_the_tokenizer_says_so(make_artifact: Make) -> None:
    folder = make_artifact()
    adding = HubTokenizer.from_file(str(folder / "tokenizer.json"))
    adding.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    adding.save(str(folder / "tokenizer.json"))
    runner = Runner.from_pretrained(folder)
    plain = len(runner.tokenizer.encode("what?"))
    assert runner.generate("what?", chat=False, max_new_tokens=1).prompt_tokens == plain + 1
    assert runner.session.tokens[0] == 1
    runner.generate("what?", max_new_tokens=1)  # a chat template writes its own
    assert runner.session.tokens[0] != 1
