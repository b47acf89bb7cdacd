"""A small tokenizer, trained here, and an artifact folder whose engine is the fake runner."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from triptych.manifest import ChatSettings, Manifest
from triptych.runtime import loaders
from triptych.runtime.fake import FakeRunner, fake_manifest

CORPUS: Final = ["a red circle and a blue square", "héllo wörld — 日本語 emoji 🎨🧑‍🚀", "one two three", "naïve café"]
SPECIAL: Final = ["<pad>", "<s>", "</s>", "<image>"]
TEMPLATE: Final = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %} assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of a few hundred tokens; <image> is id 3."""
    tokenizer = HubTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> list[FakeRunner]:
    """Make the engine "fake" known to the loaders; returns the runners that were loaded."""
    made: list[FakeRunner] = []

    def load(_folder: Path, _program: object, manifest: Manifest, _threads: int | None) -> FakeRunner:
        made.append(FakeRunner(manifest))
        return made[-1]

    monkeypatch.setattr(loaders, "_loader", lambda program, known: load)
    return made


@pytest.fixture
def make_artifact(tmp_path: Path, tokenizer_file: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Return a function that writes an artifact of the fake engine; its arguments are `fake_manifest`'s."""
    request.getfixturevalue("fake_engine")

    def make(template: str | None = TEMPLATE, **options: object) -> Path:
        manifest = fake_manifest(vocab_size=300, **options)  # type: ignore[arg-type]
        manifest = dataclasses.replace(manifest, tokenizer="tokenizer.json", chat=ChatSettings(template))
        (tmp_path / manifest.programs[0].file).touch()
        (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
        (tmp_path / "triptych.json").write_text(manifest.to_json(), encoding="utf-8")
        return tmp_path

    return make
