"""Equal inputs give byte-equal artifacts: in one process, and in processes with other hash seeds and destinations."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
CASES: Final = ("eager fp32", "eager 8da4w", "portable fp32", "xnnpack fp32", "xnnpack 8da4w")

# Hash seeds order sets, and earlier exports leave counters and caches behind: the second process runs the cases in the
# other order, and the first one runs each twice.
EXPORT: Final = """
import sys
from pathlib import Path
import tests.conftest
from tests.compiler import tiny
from triptych.compiler.stages import Source
folder = Path(sys.argv[1])
for case in sys.argv[2:]:
    target, recipe, name = case.split()
    source = Source(tiny.tiny(layers=1)).quantize(recipe).transform(tiny.DEFAULT_PASSES)
    source.capture().rewrite("last-token-logits").lower(target).save(folder / name)
"""


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def export(folder: Path, cases: list[str], seed: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(folder), *cases],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def named(cases: tuple[str, ...], run: str) -> list[str]:
    return [f"{case} {case.replace(' ', '-')}-{run}" for case in cases]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of two processes; in the first each artifact is there twice."""
    here = tmp_path_factory.mktemp("here")
    there = tmp_path_factory.mktemp("another-place") / "deeper"
    runs = [
        export(here, [*named(CASES, "first"), *named(CASES, "second")], "1"),
        export(there, named(CASES[::-1], "first"), "4711"),
    ]
    for run in runs:
        _, errors = run.communicate(timeout=600)
        assert run.returncode == 0, errors
    return here, there


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_exports_of_one_process_are_equal(exported: tuple[Path, Path], case: str) -> None:
    here, _ = exported
    assert differing(here / f"{case.replace(' ', '-')}-first", here / f"{case.replace(' ', '-')}-second") == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_another_process_with_another_hash_seed_gives_the_same_bytes(exported: tuple[Path, Path], case: str) -> None:
    here, there = exported
    name = f"{case.replace(' ', '-')}-first"
    assert differing(here / name, there / name) == []


@pytest.mark.slow
def test_another_recipe_gives_other_bytes(exported: tuple[Path, Path]) -> None:
    """The comparison sees something."""
    here, _ = exported
    assert "model.pte" in differing(here / "xnnpack-fp32-first", here / "xnnpack-8da4w-first")
    assert "eager/storages.safetensors" in differing(here / "eager-fp32-first", here / "eager-8da4w-first")


def differing(one: Path, other: Path) -> list[str]:
    first, second = content(one), content(other)
    assert len(first) >= 2, f"{one} is no artifact"
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))
