"""Programs on disk: the same text after a round trip, every storage once, nothing pickled, damage named."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.compiler import tiny
from triptych.compiler import storage
from triptych.compiler.editing import storage_identity
from triptych.compiler.manager import run_program
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.provenance import layer_of, made_by, module_path, source_line
from triptych.compiler.rewrite_rule import RewriteRule
from triptych.compiler.text import program_text
from triptych.errors import ArtifactError
from triptych.runtime.loaders import eager


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


# ---------------------------------------------------------------------------------------------------- provenance


Origin = tuple[str, str | None, str | None, str]


def origins(program: Program) -> dict[tuple[str, str], Origin]:
    """(method, node) → module, layer, source line, pass."""
    return {
        (name, node.name): (module_path(node), layer_of(node), source_line(node), made_by(node))
        for name, method in program.methods.items()
        for node in method.exported.graph.nodes
    }


@pytest.mark.parametrize("passes", [tiny.DEFAULT_PASSES, f"quantize{{recipe=8da4w}},{tiny.DEFAULT_PASSES}"])
def test_with_locations_nodes_come_from_where_they_came_from(passes: str, tmp_path: Path) -> None:
    program = tiny.captured(passes=passes).rewrite("last-token-logits,expand-tanh-gelu").program
    storage.save(program, tmp_path / "program", locations=True)
    loaded = origins(storage.load(tmp_path / "program"))
    assert loaded == origins(program)
    assert {made for *_, made in loaded.values()} == {"capture", "last-token-logits", "expand-tanh-gelu"}
    assert {"blocks.0", "blocks.1"} <= {layer for _, layer, *_ in loaded.values()}
    assert any((line or "").startswith("tiny.py:") for _, _, line, _ in loaded.values())


def test_a_result_that_nobody_uses_does_not_come_back_as_a_node(tmp_path: Path) -> None:
    """Torch's reader makes a node for every result of an operator with several."""

    class First(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.topk(x, x.shape[-1])[0]

    model = tiny.tiny(layers=1)
    model.module.get_submodule("blocks.0").register_module("norm", First())
    program = tiny.captured(model).program
    storage.save(program, tmp_path / "program", locations=True)
    assert program_text(storage.load(tmp_path / "program")) == program_text(program)


def test_without_locations_nothing_tells_the_machine_or_the_passes(tiny_program: Program, saved: Path) -> None:
    for path in (path for path in saved.rglob("*.json") if path.is_file()):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in (".py", "stack_trace", "nn_module_stack", "made_by") if word in text], path
    nodes = [node for method in storage.load(saved).methods.values() for node in method.exported.graph.nodes]
    assert {made_by(node) for node in nodes} == {"capture"}
    assert {source_line(node) for node in nodes} == {None}
    assert any(made == "last-token-logits" for *_, made in origins(tiny_program).values())


def test_a_stage_saves_its_program_without_locations(tmp_path: Path) -> None:
    tiny.captured(tiny.tiny(layers=1)).save_program(tmp_path / "program")
    assert "made_by" not in (tmp_path / "program" / storage.PROGRAM_FILE).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- whole or not


@pytest.mark.parametrize("before", [True, False], ids=["over a program", "in a new place"])
def test_an_interrupted_save_leaves_the_old_program_or_none(
    tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    folder = tmp_path / "program"
    if before:
        storage.save(tiny.captured(tiny.tiny(layers=1)).program, folder)
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.save(tiny_program, folder)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == content
    assert [path.name for path in tmp_path.iterdir()] == (["program"] if before else [])


def test_a_saved_program_is_replaced_whole(tiny_program: Program, saved: Path) -> None:
    (saved / "methods" / "of_another_program.json").write_text("{}")
    storage.save(tiny_program, saved)
    assert sorted(path.stem for path in (saved / "methods").iterdir()) == sorted(tiny_program.methods)


def test_what_is_no_program_is_not_replaced(tiny_program: Program, tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="exists and is no program; choose another folder or empty it"):
        storage.save(tiny_program, tmp_path)
    with pytest.raises(ArtifactError, match=r"photo\.jpg exists and is no folder; choose another path"):
        storage.save(tiny_program, tmp_path / "photo.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


# ---------------------------------------------------------------------------------------------------- two readers


@pytest.mark.parametrize("locations", [False, True])
def test_the_eager_engine_reads_the_same_format(tiny_program: Program, tmp_path: Path, locations: bool) -> None:
    """The runtime may import nothing of the compiler, so the reader is there twice."""
    storage.save(tiny_program, tmp_path / "program", locations=locations)
    tables = json.loads((tmp_path / "program" / storage.PROGRAM_FILE).read_text(encoding="utf-8"))
    storages, tensors = load_file(tmp_path / "program" / eager.STORAGES_FILE), dict[str, torch.Tensor]()
    modules = {
        name: eager._module(tmp_path / "program", data, storages, tensors) for name, data in tables["methods"].items()
    }
    program = storage.load(tmp_path / "program")
    assert modules.keys() == program.methods.keys() == tiny_program.methods.keys()
    sharing: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for method, module in modules.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            saved = tiny_program.methods[method].exported.state_dict[name]
            other = program.methods[method].exported.state_dict[name]
            torch.testing.assert_close(tensor.detach(), saved.detach(), rtol=0, atol=0)
            torch.testing.assert_close(other.detach(), saved.detach(), rtol=0, atol=0)
            assert type(tensor) is type(other) is type(saved)
            sharing.setdefault((storage_identity(tensor), storage_identity(other)), []).append((method, name))
    assert len(sharing) == len({first for first, _ in sharing}) == len({second for _, second in sharing}), "one to one"
    (tied,) = (group for group in sharing.values() if "token_embedding" in dict(group))
    assert set(dict(tied)) == {"token_embedding", "prefill", "decode"}, "the embedding is the projection too"
    for row in tiny_program.state:
        assert [("prefill", row), ("decode", row)] in sharing.values()
    tokens = torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad():
        embeds = modules["token_embedding"](tokens)
        got = modules["prefill"](embeds, torch.tensor([0]))
        wanted = program.methods["prefill"].exported.module()(embeds, torch.tensor([0]))
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- damage


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / storage.PROGRAM_FILE
    tables = json.loads(path.read_text(encoding="utf-8"))
    change(tables)
    path.write_text(json.dumps(tables), encoding="utf-8")


@dataclass(frozen=True)
class SpellOutGelu(RewriteRule):
    """Replace gelu(x) by another right form, which multiplies values of dynamic size."""

    name: ClassVar[str] = "spell-out-gelu"

    def pattern(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.aten.gelu.default(x, approximate="tanh")
        return found

    def replacement(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


def test_a_rule_works_on_what_was_read_back_as_on_what_was_captured(saved: Path, tiny_program: Program) -> None:
    fresh, _ = run_program(tiny_program, [SpellOutGelu()])
    read, _ = run_program(storage.load(saved), [SpellOutGelu()])
    assert program_text(read) == program_text(fresh)
    runner = ProgramRunner(read)
    for length in (1, 5):
        embeds, start = torch.randn(1, length, tiny.WIDTH), torch.tensor([0])
        got = runner.run("prefill", embeds=embeds, start_pos=start)["logits"]
        wanted = ProgramRunner(tiny_program).run("prefill", embeds=embeds, start_pos=start)["logits"]
        torch.testing.assert_close(got, wanted)


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
