import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, processors

from triptych.errors import UsageError
from triptych.runtime.tokenizers import HuggingFaceTokenizer, TextStream, Tokenizer, load_tokenizer

TEXTS = ["a red circle", "héllo — 日本語 🎨🧑‍🚀", " <image>\n<image>what?</s>", "", "  spaces  ", "\u0000\ufffd\u202e"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_file, bos_id=1, eos_ids=(2,))


def test_encodes_and_decodes_as_transformers_does(tokenizer: Tokenizer, tokenizer_file: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), clean_up_tokenization_spaces=False)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.vocab_size == len(reference)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_tokens == {"<pad>": 0, "<s>": 1, "</s>": 2, "<image>": 3}
    assert tokenizer.encode("<image>a<image>").count(3) == 2
    assert tokenizer.token_to_id("<image>") == 3
    assert tokenizer.token_to_id("no such token") is None
    plain = tokenizer.encode("a")
    assert tokenizer.encode("a", bos=True, eos=True) == [1, *plain, 2]
    assert tokenizer.adds_bos is False


def test_bos_and_eos_from_the_neighbour_and_the_post_processor(tokenizer_file: Path, tmp_path: Path) -> None:
    bare = load_tokenizer(tokenizer_file)
    assert (bare.bos_id, bare.eos_ids) == (None, ())
    with pytest.raises(UsageError, match="no BOS token"):
        bare.encode("a", bos=True)
    with pytest.raises(UsageError, match="no EOS token"):
        bare.encode("a", eos=True)
    adding = HubTokenizer.from_file(str(tokenizer_file))
    adding.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    adding.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").bos_id == 1
    assert load_tokenizer(tmp_path / "tokenizer.json").adds_bos is True
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_ids == (2,)
    assert load_tokenizer(tmp_path / "tokenizer.json", eos_ids=(0, 2)).eos_ids == (0, 2)


def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    for bad in (-1, 10**6):
        with pytest.raises(UsageError, match=f"token id {bad} is not in the vocabulary"):
            tokenizer.decode([5, bad])


def byte_fallback(path: Path) -> Tokenizer:
    """A tokenizer like Llama 2's: bytes for what it lacks, and a leading space that decoding strips."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "▁": 257, "b": 258}
    hub = HubTokenizer(models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    hub.decoder = decoders.Sequence(steps)
    hub.save(str(path))
    return HuggingFaceTokenizer(path)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*[stream.push(id_) for id_ in ids], stream.flush()]


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_stream_equals_decoding_at_once(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    fallback = kind == "byte-fallback"
    subject = byte_fallback(tmp_path / "tokenizer.json") if fallback else tokenizer
    chosen = random.Random(1)
    for text in ["añb 日本 🎨!", "a b", "🧑‍🚀" * 3]:
        ids = [256, 258, *text.encode()] if fallback else subject.encode(text)
        given = pieces(subject, ids)
        assert "".join(given) == subject.decode(ids)
        assert not any("\ufffd" in piece for piece in given)
    for _ in range(200):
        ids = [chosen.randrange(subject.vocab_size) for _ in range(chosen.randrange(1, 12))]
        if not fallback:  # byte fallback replaces a whole run of bytes at once, so invalid runs differ by design
            assert "".join(pieces(subject, ids)) == subject.decode(ids)


def test_stream_gives_no_half_character(tokenizer: Tokenizer) -> None:
    ids = [id_ for byte in "🎨".encode() for id_ in [tokenizer.token_to_id(_byte_symbol(byte))] if id_ is not None]
    assert len(ids) == 4
    assert pieces(tokenizer, ids) == ["", "", "", "🎨", ""]
    assert "\ufffd" in "".join(pieces(tokenizer, ids[:2]))  # flushed unfinished


def _byte_symbol(byte: int) -> str:
    """GPT-2's printable stand-in for a byte (https://github.com/openai/gpt-2/blob/master/src/encoder.py)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"model": ', "begins like JSON and is none"),
        (b'{"chat_template": "x"}', "no known tokenizer"),
        (b"\x0a\x0e\x0a\x05<unk>", "no known tokenizer"),
        (b'{"model": {"type": "Nothing", "vocab": {}}}', "no tokenizer the library reads"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_tokenizer(path)
    with pytest.raises(UsageError, match="no such file"):
        load_tokenizer(tmp_path / "absent.json")


def test_import_pulls_in_neither_torch_nor_an_engine() -> None:
    code = (
        "import sys, triptych.runtime, triptych.runtime.tokenizers; "
        "print([m for m in ('torch', 'executorch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
