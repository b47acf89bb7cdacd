"""The stage cache: what it skips, what makes it run again, and that nobody can tell a cached stage from a fresh one."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compiler import tiny
from tests.compiler.cached import (
    CACHED,
    PIPELINE,
    QUANTIZED,
    SCALE,
    Run,
    entries,
    keys_of,
    other_process,
    run_once,
    with_passes,
    write_module,
)
from triptych.compiler import stage_keys, storage
from triptych.compiler.custom_operators import MissingOperatorError, require_operator
from triptych.compiler.editing import storage_identity
from triptych.compiler.manager import Instrument, PassResult
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import Pass
from triptych.compiler.pipeline import Pipeline, as_pipeline
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.provenance import layer_of, made_by, source_line
from triptych.compiler.stage_cache import StageCache
from triptych.compiler.stages import Source
from triptych.compiler.text import program_text
from triptych.compiler.trace import replay
from triptych.compiler.trace_plans import make_plans, subject_of


@pytest.fixture(scope="module")
def fresh() -> Run:
    """The pipeline without any cache."""
    return run_once(None)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache after one run of the pipeline; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("stages") / "cache"
    assert not any("cached" in line for line in run_once(folder).lines)
    return folder


@pytest.fixture
def copy(filled: Path, tmp_path: Path) -> Path:
    shutil.copytree(filled, tmp_path / "cache")
    return tmp_path / "cache"


def origins(program: Program) -> list[tuple[str, str, str | None, str | None]]:
    return [
        (node.name, made_by(node), layer_of(node), source_line(node))
        for method in program.methods.values()
        for node in method.exported.graph.nodes
    ]


# ---------------------------------------------------------------------------------------------------- cached is fresh


def test_a_second_run_takes_every_step_from_the_cache(fresh: Run, filled: Path) -> None:
    again = run_once(filled)
    assert again.lines == CACHED
    assert again.text == fresh.text
    assert origins(again.captured.program) == origins(fresh.captured.program)
    assert str(again.captured.pipeline) == str(fresh.captured.pipeline) == PIPELINE
    assert again.captured.program.metadata == fresh.captured.program.metadata


def test_results_of_cached_passes_are_those_of_their_run(fresh: Run, filled: Path) -> None:
    def facts(one: Run) -> list[tuple[Any, ...]]:
        return [(r.name, r.matches, r.refusals, r.changed) for r in one.captured.results]

    again = run_once(filled)
    assert facts(again) == facts(fresh)
    assert [result.name for result in again.captured.results][:2] == ["static-kv-cache", "swap-sdpa"]
    assert all(result.seconds > 0 for result in again.captured.results)


def test_state_rows_of_equal_bytes_are_one_blob_and_stay_apart(filled: Path) -> None:
    program = run_once(filled).captured.program
    assert len(program.state) == 2, "keys and values of one layer, all zeros"
    assert len({storage_identity(row.initial) for row in program.state.values()}) == 2
    prefill, decode = (program.methods[name].exported.state_dict for name in ("prefill", "decode"))
    for name in program.state:
        assert storage_identity(prefill[name]) == storage_identity(decode[name])


def test_entries_share_their_blobs(fresh: Run, filled: Path) -> None:
    program = fresh.captured.program
    tensors = [weight.uses[0].tensor for weight in program.weights.values()]
    tensors += [row.initial for row in program.state.values()]
    distinct = {bytes(stage_keys.storage_bytes(tensor)) for tensor in tensors}
    assert len(entries(filled)) == 3
    assert sorted(path.stat().st_size for path in (filled / "blobs").iterdir()) == sorted(map(len, distinct))


def test_writing_to_a_cached_program_leaves_the_blobs_alone(copy: Path) -> None:
    program = run_once(copy).captured.program
    for row in program.state.values():
        row.initial.fill_(7.0)
    assert run_once(copy).lines == CACHED
    assert not any(row.initial.any() for row in run_once(copy).captured.program.state.values())


def test_a_cached_program_computes_what_the_model_computes(fresh: Run, filled: Path) -> None:
    model = tiny.tiny(layers=1)
    oracle = Oracle(model, make_plans(subject_of(model), 4, prompt_lengths=(1, 9)))
    cached = ProgramRunner(run_once(filled).captured.program)
    reports = list(oracle.judge(cached, cached.methods, perturbed=True))
    assert reports
    assert [one.failures for one in reports if not one.passed] == []
    own = ProgramRunner(fresh.captured.program)
    for one in oracle.references:
        wanted, got = replay(own, one.trace, own.methods), replay(cached, one.trace, cached.methods)
        torch.testing.assert_close(dict(got.outputs), dict(wanted.outputs), rtol=0, atol=0)
        torch.testing.assert_close(dict(got.state), dict(wanted.state), rtol=0, atol=0)


def test_later_passes_and_lowering_see_no_difference(fresh: Run, filled: Path, tmp_path: Path) -> None:
    cached = run_once(filled).captured
    for target in ("legalize-aten", "legalize-executorch"):
        wanted, got = (program_text(one.rewrite(target).program) for one in (fresh.captured, cached))
        assert got == wanted
    for name, captured in (("fresh", fresh.captured), ("cached", cached)):
        captured.lower("eager").save(tmp_path / name)
    names = sorted(path.relative_to(tmp_path / "fresh") for path in (tmp_path / "fresh").rglob("*") if path.is_file())
    assert Path("triptych.json") in names
    for name in names:
        assert (tmp_path / "cached" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


@pytest.mark.slow
def test_a_cached_program_lowers_to_the_same_pte(fresh: Run, filled: Path, tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    fresh.captured.lower("portable").save(tmp_path / "fresh")
    run_once(filled).captured.lower("portable").save(tmp_path / "cached")
    assert (tmp_path / "cached" / "model.pte").read_bytes() == (tmp_path / "fresh" / "model.pte").read_bytes()


@pytest.mark.slow
def test_quantized_programs_with_custom_operators_come_back_in_another_process(tmp_path: Path) -> None:
    """The other process has imported neither torchao nor executorch when it reads the cache."""
    first = run_once(tmp_path / "cache", QUANTIZED)
    again = run_once(tmp_path / "cache", QUANTIZED)
    assert [line for line in again.lines if "(cached)" not in line] == []
    source = Source(tiny.tiny(layers=1)).transform("quantize{recipe=8da4w}")
    oracle = Oracle(source.model, make_plans(subject_of(source.model), 3, prompt_lengths=(5,)), quantized=True)
    runner = ProgramRunner(again.captured.program)
    assert [one.failures for one in oracle.judge(runner, runner.methods) if not one.passed] == []
    done = other_process(f"once({str(tmp_path / 'cache')!r}, {QUANTIZED!r})").communicate()[0]
    lines, text = json.loads(done)
    assert lines == ["capture (cached)", "last-token-logits (cached)", "legalize-executorch (cached)"]
    assert text == first.text
    assert "llama.custom_sdpa" in text
    assert "torchao" in text


# ---------------------------------------------------------------------------------------------------- what runs again


def test_a_changed_option_of_the_last_pass_runs_that_pass_alone(copy: Path, tmp_path: Path) -> None:
    scale = write_module(tmp_path, SCALE).Scale
    assert run_once(copy, with_passes(scale(2.0))).lines == [*CACHED[:2], "scale"]
    changed = run_once(copy, with_passes(scale(3.0)))
    assert changed.lines == [*CACHED[:2], "scale"]
    assert changed.text.count("3.0") == 2
    assert run_once(copy, with_passes(scale(2.0))).lines == [*CACHED[:2], "scale (cached)"]


def test_a_changed_pass_source_runs_from_there(copy: Path, tmp_path: Path) -> None:
    def with_scale() -> Pipeline:
        expand = as_pipeline("capture,legalize-aten").program
        return with_passes(sys.modules["a_pass_of_mine"].Scale(), *expand)

    write_module(tmp_path, SCALE)
    run_once(copy, with_scale())
    assert run_once(copy, with_scale()).lines == [*CACHED[:2], "scale (cached)", "legalize-aten (cached)"]
    write_module(tmp_path, SCALE.replace("return factor", "return 5 * factor"))
    changed = run_once(copy, with_scale())
    assert changed.lines == [*CACHED[:2], "scale", "legalize-aten"]
    assert "10.0" in changed.text


def test_a_changed_weight_runs_everything(copy: Path) -> None:
    model = tiny.tiny(layers=1)
    with torch.no_grad():
        model.module.get_parameter("blocks.0.up.weight")[3, 4] += 1e-3
    changed = run_once(copy, model=model)
    assert not [line for line in changed.lines if "cached" in line]
    assert {"static-kv-cache", "swap-sdpa", "capture prefill", "last-token-logits"} <= set(changed.lines)


# ---------------------------------------------------------------------------------------------------- never cached


def test_a_pass_without_a_source_is_not_cached_nor_what_follows(copy: Path) -> None:
    console: dict[str, Any] = {"__name__": "__console__"}
    exec(SCALE, console)  # noqa: S102 (this is how a shell defines a class)
    pipeline = with_passes(console["Scale"](), *as_pipeline("capture,legalize-aten").program)
    before = entries(copy)
    for _ in range(2):
        lines = run_once(copy, pipeline).lines
        assert lines[0] == "nothing is cached from scale on: the source of __console__ cannot be found"
        assert lines[1:] == [*CACHED[:2], "scale", "legalize-aten"]
    assert entries(copy) == before


class Watch(Instrument):
    """Remembers the passes it saw."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def after(self, one: Pass, before: Model | Program, after: Model | Program, result: PassResult) -> None:
        self.seen.append(one.name)


def test_instruments_see_every_pass_and_only_the_capture_is_cached(fresh: Run, filled: Path) -> None:
    watch = Watch()
    again = run_once(filled, instruments=(watch,))
    assert watch.seen == ["static-kv-cache", "swap-sdpa", "last-token-logits", "expand-tanh-gelu"]
    assert [line for line in again.lines if "capture" in line] == ["capture (cached)"]
    assert again.text == fresh.text
    assert [result.name for result in again.captured.results] == watch.seen


# ---------------------------------------------------------------------------------------------------- damage


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit in a graph": ("entries/{key}/methods/decode.json", _flip),
    "half the tables": ("entries/{key}/program.json", _cut),
    "no graph": ("entries/{key}/methods/prefill.json", Path.unlink),
    "half the entry's own table": ("entries/{key}/entry.json", _cut),
    "no checksums": ("entries/{key}/checksums.json", Path.unlink),
    "checksums that are a list": ("entries/{key}/checksums.json", lambda path: path.write_text("[]")),
    "a flipped bit in a blob": ("blobs/{blob}", _flip),
    "half a blob": ("blobs/{blob}", _cut),
    "no blob": ("blobs/{blob}", Path.unlink),
}


@pytest.mark.parametrize(("file", "damage"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_thrown_away_with_a_line(copy: Path, file: str, damage: Callable[[Path], object]) -> None:
    key = keys_of()[-1]
    blob = max((copy / "blobs").iterdir(), key=lambda path: path.stat().st_size)
    damage(copy / file.format(key=key, blob=blob.name))
    heard: list[str] = []
    assert StageCache(copy).load(key, "expand-tanh-gelu", heard.append) is None
    assert heard == [f"cache entry {key[:12]} (expand-tanh-gelu) is damaged; rebuilding"]
    assert not (copy / "entries" / key).exists()
    assert blob.exists() == (not file.startswith("blobs"))


def test_a_damaged_entry_is_rebuilt_from_the_step_before(fresh: Run, copy: Path) -> None:
    key = keys_of()[-1]
    _flip(copy / "entries" / key / "program.json")
    again = run_once(copy)
    damaged = f"cache entry {key[:12]} (expand-tanh-gelu) is damaged; rebuilding"
    assert again.lines == [damaged, *CACHED[:2], "expand-tanh-gelu"]
    assert again.text == fresh.text
    assert run_once(copy).lines == CACHED


def test_a_truncated_blob_is_written_anew(fresh: Run, copy: Path) -> None:
    _cut(max((copy / "blobs").iterdir(), key=lambda path: path.stat().st_size))
    again = run_once(copy)
    assert len([line for line in again.lines if line.endswith("is damaged; rebuilding")]) == 3, "all steps share it"
    assert "capture prefill" in again.lines
    assert again.text == fresh.text
    assert run_once(copy).lines == CACHED


def test_an_export_does_not_fail_for_its_cache(fresh: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "write_graphs", full)
    done = run_once(tmp_path / "cache")
    assert done.text == fresh.text
    assert [line for line in done.lines if "cached" in line] == [
        f"{step} is not cached: No space left on device"
        for step in ("capture", "last-token-logits", "expand-tanh-gelu")
    ]
    assert entries(tmp_path / "cache") == []


def test_a_stage_with_an_unknown_operator_is_left_alone(copy: Path) -> None:
    key = keys_of()[-1]
    entry = copy / "entries" / key
    table = json.loads((entry / "entry.json").read_text())
    table["operators"].append("nowhere.warp.default")
    (entry / "entry.json").write_text(json.dumps(table))
    checksums = json.loads((entry / "checksums.json").read_text())
    checksums["files"]["entry.json"] = stage_keys.digest((entry / "entry.json").read_bytes())
    (entry / "checksums.json").write_text(json.dumps(checksums))
    lines = run_once(copy).lines
    assert lines[0].startswith(f"cache entry {key[:12]} (expand-tanh-gelu) is not used: the program calls nowhere.warp")
    assert lines[1:] == [*CACHED[:2], "expand-tanh-gelu"]
    assert entry.is_dir()


def test_operators_are_registered_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_operator("aten.add.Tensor")
    require_operator("triptych.update_cache.default")
    with pytest.raises(MissingOperatorError, match=r"calls nowhere\.warp\.default, which nothing registers; import"):
        require_operator("nowhere.warp.default")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingOperatorError, match=r"calls torchao\.warp\.default, and .*torchao\.quantization"):
        require_operator("torchao.warp.default")
