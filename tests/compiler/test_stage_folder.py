"""The folder of the stage cache: its bound, several writers at once, and the options that name it."""

import json
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import triptych
from tests.compiler import tiny
from tests.compiler.cached import CACHED, KEY, PIPELINE, entries, other_process, run_once, size_of
from triptych import api
from triptych.cli.export import export as export_command
from triptych.compiler.program import Program
from triptych.compiler.stage_cache import Stage, StageCache
from triptych.compiler.text import program_text
from triptych.errors import UsageError


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache after one run of the pipeline; no test changes it."""
    folder = tmp_path_factory.mktemp("stages") / "cache"
    run_once(folder)
    return folder


# ---------------------------------------------------------------------------------------------------- the folder


def test_the_least_recently_used_entries_go_when_the_bound_is_reached(tiny_program: Program, tmp_path: Path) -> None:
    folder, stage, heard = tmp_path / "cache", Stage(tiny_program, ()), list[str]()
    keys = [digit * 40 for digit in "abc"]
    StageCache(folder).store(keys[0], "a", stage, {}, heard.append)
    one = size_of(folder / "entries")
    bound = size_of(folder) + one + one // 2
    cache = StageCache(folder, max_bytes=bound)
    cache.store(keys[1], "b", stage, {}, heard.append)
    assert len(entries(folder)) == 2
    assert cache.load(keys[0], "a", heard.append) is not None
    cache.store(keys[2], "c", stage, {}, heard.append)
    assert [path.name for path in entries(folder)] == [keys[0], keys[2]], "b was used longest ago"
    assert size_of(folder) <= bound
    assert heard == []


def test_blobs_that_no_entry_needs_go_too(tiny_program: Program, tmp_path: Path) -> None:
    heard: list[str] = []
    other, big = tiny.captured(tiny.tiny(layers=1, seed=5)).program, Stage(tiny_program, ())
    StageCache(tmp_path / "big").store("1" * 40, "big", big, {}, heard.append)
    folder = tmp_path / "cache"
    StageCache(folder).store(KEY, "small", Stage(other, ()), {}, heard.append)
    left = set((folder / "blobs").iterdir())
    (folder / "entries" / f".{KEY}.new-999999").mkdir()
    (folder / "blobs" / ".half").write_bytes(b"0")
    StageCache(folder, max_bytes=size_of(tmp_path / "big") + 1000).store("1" * 40, "big", big, {}, heard.append)
    names = [sorted(path.relative_to(one) for path in one.rglob("*")) for one in (folder, tmp_path / "big")]
    assert names[0] == names[1], "nothing is left of the small one, nor of what a killed process was writing"
    assert not left <= set((folder / "blobs").iterdir())
    assert heard == []


def test_an_entry_larger_than_the_bound_is_not_stored(filled: Path, tiny_program: Program, tmp_path: Path) -> None:
    shutil.copytree(filled, tmp_path / "cache")
    before, heard = entries(tmp_path / "cache"), list[str]()
    cache = StageCache(tmp_path / "cache", max_bytes=50_000)
    cache.store(KEY, "capture", Stage(tiny_program, ()), {}, heard.append)
    assert len(heard) == 1
    assert heard[0].startswith("capture is not cached: it takes ")
    assert heard[0].endswith(" bytes, the cache holds 50,000")
    assert entries(tmp_path / "cache") == before, "nothing else went for it"


def test_threads_that_store_one_stage_at_once_both_end_well(tiny_program: Program, tmp_path: Path) -> None:
    heard: list[str] = []
    begin = threading.Barrier(3)

    def store() -> None:
        cache = StageCache(tmp_path / "cache")
        begin.wait()
        cache.store(KEY, "capture", Stage(tiny_program, ()), {}, heard.append)

    threads = [threading.Thread(target=store) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stage = StageCache(tmp_path / "cache").load(KEY, "capture", heard.append)
    assert heard == []
    assert stage is not None
    assert program_text(stage.program) == program_text(tiny_program)
    assert [path.name for path in entries(tmp_path / "cache")] == [KEY]


@pytest.mark.slow
def test_processes_that_fill_one_cache_at_once_both_end_well(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    texts: list[str] = []
    processes = [other_process(f"once({str(cache)!r}, {PIPELINE!r})") for _ in range(2)]
    for process in processes:
        lines, text = json.loads(process.communicate()[0])
        texts.append(text)
        assert not [line for line in lines if "damaged" in line or "not cached" in line]
    again = run_once(cache)
    assert again.lines == CACHED
    assert texts == [again.text, again.text]


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="is not empty and no cache of stages; choose another folder"):
        StageCache(tmp_path)
    with pytest.raises(UsageError, match=r"photo\.jpg is no folder; choose another path"):
        StageCache(tmp_path / "photo.jpg")


def test_looking_into_a_cache_that_is_not_there_makes_no_folder(tmp_path: Path) -> None:
    heard: list[str] = []
    assert StageCache(tmp_path / "cache").load(KEY, "capture", heard.append) is None
    assert heard == []
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------- wiring


def test_export_takes_a_cache(tmp_path: Path) -> None:
    heard: list[str] = []
    for name in ("first", "second"):
        heard.clear()
        triptych.export(
            tiny.tiny(layers=1), out=tmp_path / name, target="eager", cache=tmp_path / "cache", progress=heard.append
        )
    assert heard[:2] == [CACHED[0], "precompute-rope (cached)"]
    first, second = ((tmp_path / name / "triptych.json").read_bytes() for name in ("first", "second"))
    assert first == second, "the manifest holds the hash of every other file"


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    triptych.export(tiny.tiny(layers=1), out=tmp_path / "artifact", target="eager")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_impossible_caches_are_refused_before_any_work(tmp_path: Path) -> None:
    heard: list[str] = []
    with pytest.raises(UsageError, match=r"lies in .*artifact, which the artifact replaces; choose another folder"):
        triptych.export(tmp_path, out=tmp_path / "artifact", cache=tmp_path / "artifact" / "c", progress=heard.append)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and no cache of stages"):
        triptych.export(tmp_path, out=tmp_path / "artifact", cache=tmp_path, progress=heard.append)
    with pytest.raises(UsageError, match="ignores cache; add out="):
        triptych.export(tiny.tiny(layers=1), cache=tmp_path / "cache")  # type: ignore[call-overload]
    assert heard == []


def test_the_command_passes_the_cache_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def export(_: Path, **options: Any) -> None:
        given.update(options)
        raise SystemExit(7)

    monkeypatch.setattr(api, "export", export)
    monkeypatch.setattr(sys.modules["triptych.cli.export"], "quiet_libraries", lambda: None)
    outcome = CliRunner().invoke(export_command, ["model", "--out", "out", "--cache", str(tmp_path / "cache")])
    assert outcome.exit_code == 7
    assert given["cache"] == tmp_path / "cache"
