"""The code in the documentation runs, and what the documentation lists exists."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.repository.sources import copy_sources
from triptych.catalogue import pass_info, pass_page
from triptych.compiler.registry import find_pass, pass_names
from triptych.compiler.targets.base import target_names
from triptych.demo.scenes import random_scene, render

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)


def blocks(name: str, kind: re.Pattern[str] = PYTHON) -> list[str]:
    return kind.findall((ROOT / name).read_text(encoding="utf-8"))


def run(*command: str, cwd: Path, source: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


ALL_COMMANDS = """
import contextlib, io, json, shlex, sys
from triptych.cli import main
outputs = {}
for line in json.loads(sys.argv[1]):
    print(line, file=sys.stderr)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            main(shlex.split(line)[1:])
        except SystemExit as end:
            assert not end.code, line
    outputs[line] = output.getvalue()
print(json.dumps(outputs))
"""


def run_commands(lines: list[str], cwd: Path, source: Path | None = None) -> dict[str, str]:
    """Run the lines that call triptych, one after the other in one process; return what each printed."""
    commands = [line for line in lines if line.startswith("triptych ")]
    done = run("-c", ALL_COMMANDS, json.dumps(commands), cwd=cwd, source=source)
    assert done.returncode == 0, done.stderr
    outputs: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return outputs


@pytest.mark.parametrize("page", ["docs/entry-points.md", "docs/passes.md", "docs/debug-a-pass.md"])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path) -> None:
    (block,) = blocks(page)
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    done = run(str(script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if page == "docs/entry-points.md":
        assert (tmp_path / "tiny-artifact" / "triptych.json").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_runs(demo_checkpoint: Path, tmp_path: Path) -> None:
    (block,) = blocks("README.md")
    (tmp_path / "checkpoint").symlink_to(demo_checkpoint)
    rng = random.Random(0)
    render(random_scene(rng, test=True), rng, size=128).save(tmp_path / "picture.png")
    done = run("-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"top|bottom|left|right", done.stdout), "the runner describes the picture"


@pytest.fixture(scope="module")
def tutorial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which somebody has followed the tutorial."""
    tree = tmp_path_factory.mktemp("tutorial") / "checkout"
    copy_sources(tree)
    code, test = blocks("docs/write-a-pass.md")
    (tree / "passes" / "remove_unit_scale.py").write_text(code, encoding="utf-8")
    (tree / "test_remove_unit_scale.py").write_text(test, encoding="utf-8")
    return tree


def test_the_tutorials_pass_is_at_most_25_lines() -> None:
    code, _ = blocks("docs/write-a-pass.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


def test_the_tutorials_test_passes(tutorial: Path) -> None:
    done = run("-m", "pytest", "-q", "test_remove_unit_scale.py", cwd=tutorial, source=tutorial / "src")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tutorials_commands_run(tutorial: Path) -> None:
    (commands,) = blocks("docs/write-a-pass.md", SHELL)
    outputs = run_commands(commands.splitlines(), tutorial, tutorial / "src")
    assert len(outputs) == 3
    assert all(outputs.values())


def test_the_commands_of_the_debugging_page_run(tmp_path: Path) -> None:
    outputs = run_commands("".join(blocks("docs/debug-a-pass.md", SHELL)).splitlines(), tmp_path)
    assert len(outputs) >= 7
    assert all(outputs.values())
    assert (tmp_path / "program.html").stat().st_size > 1000


def test_every_pass_documents_itself_and_its_options() -> None:
    for name in pass_names():
        info = pass_info(find_pass(name))
        page = pass_page(info)
        assert page.startswith(f"# {name}\n\n{info.summary}\n")
        assert len(info.summary) > 20, name
        text = f"{info.summary}\n{info.description}"
        assert [one.name for one in info.options if f"`{one.name}`" not in text] == [], name


def test_every_target_is_documented() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in target_names() if f"`{name}`" not in readme] == []


def test_links_in_the_documentation_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            broken += [] if (page.parent / link).exists() else [f"{page.name}: {link}"]
    assert broken == []
