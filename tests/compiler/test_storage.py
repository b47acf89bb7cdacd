"""Programs on disk: the same text after a round trip, every storage once, nothing pickled, damage named."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open

from tests.compiler import tiny
from triptych.compiler import storage
from triptych.compiler.editing import storage_identity
from triptych.compiler.program import Program
from triptych.compiler.text import program_text
from triptych.errors import ArtifactError


@pytest.fixture
def saved(tiny_program: Program, tmp_path: Path) -> Path:
    storage.save(tiny_program, tmp_path / "program")
    return tmp_path / "program"


@pytest.fixture
def no_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "_Unpickler", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)


def test_a_loaded_program_has_the_same_text(tiny_program: Program, saved: Path) -> None:
    assert program_text(storage.load(saved)) == program_text(tiny_program)


def test_metadata_survives(tiny_program: Program, saved: Path) -> None:
    assert storage.load(saved).metadata == tiny_program.metadata


@pytest.mark.usefixtures("no_pickle")
def test_nothing_is_unpickled_on_load(saved: Path) -> None:
    assert storage.load(saved).methods


def test_no_file_is_an_archive_or_a_pickle(saved: Path) -> None:
    for path in (path for path in saved.rglob("*") if path.is_file()):
        start = path.read_bytes()[:4]
        assert not start.startswith((b"PK", b"\x80")), path
        assert path.suffix in (".json", ".safetensors"), path


def test_methods_share_state_and_weights_after_load(saved: Path) -> None:
    program = storage.load(saved)
    prefill, decode = (program.methods[name].exported.state_dict for name in ("prefill", "decode"))
    for name in set(prefill) & set(decode):
        assert storage_identity(prefill[name]) == storage_identity(decode[name]), name


def test_every_storage_is_written_once(tiny_program: Program, saved: Path) -> None:
    expected = sum(weight.nbytes for weight in tiny_program.weights.values())
    expected += sum(row.initial.numel() * row.initial.element_size() for row in tiny_program.state.values())
    with safe_open(saved / storage.STORAGES_FILE, "pt") as file:
        written = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (no dictionary)
    assert written == expected


def test_a_loaded_program_computes_the_models_own_forward(saved: Path) -> None:
    module = tiny.tiny().module
    tokens = torch.randint(0, tiny.VOCABULARY, (1, 7))
    methods = {name: method.exported.module() for name, method in storage.load(saved).methods.items()}
    with torch.no_grad():
        logits = methods["prefill"](methods["token_embedding"](tokens), torch.tensor([0]))
        wanted = module(tokens)[:, -1]
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_quantized_programs_survive_too(tmp_path: Path) -> None:
    program = tiny.captured(passes="quantize{recipe=8da4w},static-kv-cache,swap-sdpa").program
    storage.save(program, tmp_path / "program")
    assert program_text(storage.load(tmp_path / "program")) == program_text(program)


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / storage.PROGRAM_FILE
    tables = json.loads(path.read_text(encoding="utf-8"))
    change(tables)
    path.write_text(json.dumps(tables), encoding="utf-8")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tables": lambda folder: (folder / "program.json").unlink(),
    "half the tables": lambda folder: _cut(folder / "program.json"),
    "tables that are a list": lambda folder: (folder / "program.json").write_text("[]"),
    "no storages": lambda folder: (folder / "storages.safetensors").unlink(),
    "half the storages": lambda folder: _cut(folder / "storages.safetensors"),
    "no graph": lambda folder: (folder / "methods" / "decode.json").unlink(),
    "half a graph": lambda folder: _cut(folder / "methods" / "decode.json"),
    "an empty graph": lambda folder: (folder / "methods" / "decode.json").write_text("{}"),
    "another format": lambda folder: _edit(folder, lambda tables: tables.update(format="other")),
    "a later version": lambda folder: _edit(folder, lambda tables: tables.update(version=2)),
    "no metadata": lambda folder: _edit(folder, lambda tables: tables.pop("metadata")),
    "an unknown storage": lambda folder: _edit(
        folder, lambda tables: tables["methods"]["decode"]["tensors"]["norm.weight"].update(storage="nothing")
    ),
    "a tensor past the end of its storage": lambda folder: _edit(
        folder, lambda tables: tables["methods"]["decode"]["tensors"]["norm.weight"].update(offset=10**6)
    ),
    "an unknown dtype": lambda folder: _edit(
        folder, lambda tables: tables["methods"]["decode"]["tensors"]["norm.weight"].update(dtype="float33")
    ),
    "a graph without its tensor": lambda folder: _edit(
        folder, lambda tables: tables["methods"]["decode"]["tensors"].pop("norm.weight")
    ),
    "an unknown role": lambda folder: _edit(folder, lambda tables: tables["methods"]["decode"].update(roles=["guess"])),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_program_is_an_artifact_error(saved: Path, damage: Callable[[Path], object]) -> None:
    damage(saved)
    with pytest.raises(ArtifactError) as caught:
        storage.load(saved)
    assert str(saved) in str(caught.value)
