"""Passes and targets are found by file name, and third parties' by entry point; a name has one owner."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from triptych.compiler import registry
from triptych.compiler.targets.base import find_target, target_names
from triptych.errors import PipelineError, UsageError

ROOT = Path(__file__).parent.parent.parent

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from triptych.compiler.pass_kinds import GraphPass


@dataclass(frozen=True)
class ReluToClamp(GraphPass):
    """Every GELU becomes the exact form."""

    name: ClassVar[str] = "exact-gelu"
    only_method: str = "decode"

    def rewrite(self, editor, method, log):
        for node in editor.calls(torch.ops.aten.gelu.default):
            if any(role.kind == self.only_method for role in method.roles) and log.match(node):
                node.kwargs = {}
'''
PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "triptych-exact-gelu"
version = "1.0"

[project.entry-points."triptych.passes"]
exact-gelu = "triptych_exact_gelu:ReluToClamp"

[tool.setuptools]
py-modules = ["triptych_exact_gelu"]
"""
USE = """
from tests.compiler import tiny
from triptych.compiler.registry import pass_names
from triptych.compiler.text import method_text

assert "exact-gelu" in pass_names(), pass_names()
program = tiny.captured(tiny.tiny(layers=1)).rewrite("exact-gelu{only_method=prefill}")
print(*program.results[-1].matches)
for name, method in program.program.methods.items():
    print(name, "approximate=tanh" in method_text(name, method))
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distribution with one pass, really installed into a folder of its own."""
    source, site = tmp_path_factory.mktemp("plugin"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "triptych_exact_gelu.py").write_text(PLUGIN)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", site, source], check=True, timeout=120)
    return site


def python(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    path = ":".join(map(str, (ROOT, *paths)))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def claim(site: Path, distribution: str, name: str, value: str) -> None:
    """Write the metadata that an installed distribution has."""
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[triptych.passes]\n{name} = {value}\n")


def test_every_file_of_the_passes_folder_is_a_pass_of_that_name() -> None:
    files = {path.stem.replace("_", "-") for path in (ROOT / "passes").glob("*.py") if path.stem != "__init__"}
    assert files <= set(registry.pass_names())
    assert {registry.find_pass(name).name for name in files} == files


def test_the_targets_are_the_three_of_the_manual() -> None:
    assert {"eager", "portable", "xnnpack"} <= set(target_names())
    assert {find_target(name).name for name in target_names()} == set(target_names())


def test_asking_for_names_imports_no_pass() -> None:
    done = python(
        "import sys; from triptych.compiler.registry import pass_names; assert 'swap-sdpa' in pass_names();"
        "assert 'triptych.passes.swap_sdpa' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_installed_plugin_is_a_pass_like_any_other(plugin: Path) -> None:
    done = python(USE, plugin)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "prefill: gelu",
        "token_embedding False",
        "prefill False",
        "decode True",
    ]


def test_a_name_claimed_by_two_distributions_names_both(plugin: Path, tmp_path: Path) -> None:
    claim(tmp_path, "other-gelu", "exact-gelu", "other_gelu:Pass")
    done = python("from triptych.compiler.pipeline import parse; parse('capture,exact-gelu')", plugin, tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert "UsageError" in last
    assert "triptych-exact-gelu (triptych_exact_gelu:ReluToClamp)" in last
    assert "other-gelu (other_gelu:Pass)" in last


def test_a_built_in_name_claimed_by_a_distribution_names_it(tmp_path: Path) -> None:
    claim(tmp_path, "greedy-package", "swap-sdpa", "greedy:Pass")
    done = python("from triptych.compiler.registry import find_pass; find_pass('swap-sdpa')", tmp_path)
    assert (
        "UsageError: the pass 'swap-sdpa' is built in and also claimed by greedy-package (greedy:Pass)" in done.stderr
    )


def test_a_plugin_that_does_not_import_is_an_error_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken-pass", "no_such_module:Pass", registry.PASS_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken] if group == registry.PASS_GROUP else [])
    with pytest.raises(UsageError, match=r"broken-pass|no_such_module"):
        registry.find_pass("broken-pass")


def test_a_plugin_that_is_no_pass_is_an_error_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = EntryPoint("path-pass", "pathlib:Path", registry.PASS_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [wrong] if group == registry.PASS_GROUP else [])
    with pytest.raises(UsageError, match=r"path-pass|pathlib"):
        registry.find_pass("path-pass")


@pytest.mark.parametrize("name", ["Swap_SDPA", "swap_sdpa", "", "__init__"])
def test_only_the_exact_name_is_found(name: str) -> None:
    with pytest.raises(PipelineError, match="no pass is called"):
        registry.find_pass(name)
