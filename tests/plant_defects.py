"""Plants defects one by one in a copy of the sources and shows the test that goes red for each.

``python -m tests.plant_defects`` first runs the named tests on an untouched copy, where all must pass, then
once for each defect, where the named test must fail. Exits with 1 where a defect stays unseen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.repository.sources import ROOT, copy_sources


@dataclass(frozen=True)
class Defect:
    """One wrong line: `old` in `file` becomes `new`, and `test` must go red."""

    name: str
    file: str
    old: str
    new: str
    test: str


DEFECTS: Final = (
    Defect(
        "switch off the shared cache",
        "compiler/targets/executorch.py",
        "share_mutable_buffers=True",
        "share_mutable_buffers=False",
        "tests/test_guards.py::test_decode_reads_what_prefill_wrote",
    ),
    Defect(
        "untie a weight",
        "compiler/editing.py",
        "return torch.nn.Parameter(tensor.detach(), requires_grad=False)",
        "return torch.nn.Parameter(tensor.detach().clone(), requires_grad=False)",
        "tests/test_guards.py::test_weights_are_stored_once",
    ),
    Defect(
        "drop the mask",
        "modules/operators.py",
        "attn_mask=mask,",
        "attn_mask=torch.ones_like(mask),",
        "tests/test_guards.py::test_parity_with_the_eager_model",
    ),
    Defect(
        "break the image normalization",
        "runtime/images.py",
        "values = (values - _channels(settings.mean)) / _channels(settings.std)",
        "values = values - _channels(settings.mean)",
        "tests/test_guards.py::test_pixel_values_equal_those_of_transformers",
    ),
    Defect(
        "scale one layer of the reference by 1.5",
        "tests/test_guards.py",
        "REFERENCE_LAYER_SCALE = 1.0",
        "REFERENCE_LAYER_SCALE = 1.5",
        "tests/test_guards.py::test_parity_with_the_eager_model",
    ),
)


def run_tests(tree: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on `tests` with the sources of `tree`, not those that are installed."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src")}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "--tb=line", "-p", "no:cacheprovider", *tests]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def copy_tree(to: Path) -> Path:
    """Copy the sources and the tests to the new folder `to`."""
    copy_sources(to)
    shutil.copytree(ROOT / "tests", to / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    return to


def plant(tree: Path, defect: Defect) -> None:
    """Change the line in the copy; raises `ValueError` where it does not stand there exactly once."""
    path = tree / defect.file
    text = path.read_text(encoding="utf-8")
    if text.count(defect.old) != 1:
        raise ValueError(
            f"{defect.file} has {defect.old!r} {text.count(defect.old)} times; bring this script up to date"
        )
    path.write_text(text.replace(defect.old, defect.new), encoding="utf-8")


def main() -> int:
    """Run everything and print a line for each defect."""
    with tempfile.TemporaryDirectory() as folder:
        clean = run_tests(copy_tree(Path(folder) / "clean"), *dict.fromkeys(defect.test for defect in DEFECTS))
        if clean.returncode != 0:
            print(f"without a defect the tests fail already:\n{clean.stdout}")
            return 1
        print("without a defect: green")
        unseen = 0
        for number, defect in enumerate(DEFECTS):
            tree = copy_tree(Path(folder) / str(number))
            plant(tree, defect)
            done = run_tests(tree, defect.test)
            # pytest's 1 means that a test failed; any other code that it could not run.
            red = done.returncode == 1
            unseen += not red
            reason = next((line for line in done.stdout.splitlines() if "Error" in line or line.startswith("E ")), "")
            print(f"{defect.name}: {'red' if red else 'NOT SEEN'}  {defect.test}\n    {reason.strip()[:160]}")
            shutil.rmtree(tree)
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
