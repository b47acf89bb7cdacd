"""The import rules hold, and a planted violation of each is found through the links under src/triptych."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository.sources import LINKED, ROOT, copy_sources


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH goes before the editable install, so that the given tree is the one that is read.
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "COLUMNS": "200"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120, check=False)


def ruff_check(tree: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", "."]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources with their links, to plant violations in."""
    return copy_sources(tmp_path / "tree")


def test_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Contracts: \d+ kept, 0 broken", done.stdout)


@pytest.mark.parametrize("folder", LINKED)
def test_package_is_a_relative_link_to_its_root_folder(folder: str) -> None:
    link = ROOT / "src" / "triptych" / folder
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{folder}"


@pytest.mark.parametrize(
    ("where", "planted", "contract"),
    [
        ("runtime", "import triptych.compiler", "runtime imports none of compiler, passes and modules"),
        ("runtime", "import triptych.passes", "runtime imports none of compiler, passes and modules"),
        ("runtime", "from triptych import modules", "runtime imports none of compiler, passes and modules"),
        ("passes", "import triptych.runtime", "passes import compiler and modules, never runtime"),
        ("compiler", "import triptych.passes", "compiler imports neither passes nor runtime"),
        ("compiler", "import triptych.runtime", "compiler imports neither passes nor runtime"),
        ("modules", "import triptych.compiler", "modules import nothing of Triptych but errors"),
        ("modules", "import triptych.manifest", "modules import nothing of Triptych but errors"),
        ("modules", "import executorch.exir", "executorch is imported by"),
        ("passes", "import torchao.quantization", "torchao is imported by"),
        ("runtime", "import transformers", "transformers is imported by"),
        ("runtime/tokenizers", "import torch", "tokenizers are usable alone"),
        ("runtime/tokenizers", "import triptych.runtime.sampling", "tokenizers are usable alone"),
        ("runtime/sampling", "import triptych.manifest", "sampling is usable alone"),
        ("src/triptych/manifest.py", "import torch", "manifest imports the standard library"),
        ("src/triptych/errors.py", "import triptych.manifest", "errors import the standard library only"),
    ],
)
def test_planted_import_breaks_its_contract(tree: Path, where: str, planted: str, contract: str) -> None:
    target = tree / where
    if target.is_dir():
        # In a function, since imports are late here as a rule.
        (target / "planted.py").write_text(f"def late() -> None:\n    {planted}\n", encoding="utf-8")
    else:
        with target.open("a", encoding="utf-8") as file:
            file.write(f"\n{planted}\n")
    done = lint_imports(tree)
    assert done.returncode != 0
    broken = [line for line in done.stdout.splitlines() if " BROKEN" in line]
    assert any(line.startswith(contract) for line in broken), done.stdout + done.stderr


@pytest.mark.parametrize("folder", LINKED)
def test_root_folder_refuses_its_bare_name(folder: str) -> None:
    command = [sys.executable, "-c", f"import {folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert f"ImportError: import this package as 'triptych.{folder}'" in done.stderr


@pytest.mark.parametrize("folder", LINKED)
@pytest.mark.parametrize("form", ["import {0}", "from {0} import planted", "import {0}.planted as other"])
def test_linter_bans_bare_names(tree: Path, folder: str, form: str) -> None:
    (tree / "src/triptych/planted.py").write_text(f"{form.format(folder)}\n", encoding="utf-8")
    done = ruff_check(tree)
    assert done.returncode != 0
    assert re.search(rf"planted\.py.*TID251.*`{folder}.*` is banned", done.stdout), done.stdout + done.stderr
