"""What is shipped: a wheel and an sdist with ordinary folders where the source tree has links."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Final

import pytest

from tests.repository.sources import LINKED, ROOT, copy_sources

pytestmark = pytest.mark.slow

DATA: Final = (".json", ".typed")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of a copy of this tree, and the wheel built from that sdist."""
    tree = copy_sources(tmp_path_factory.mktemp("source") / "tree")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist"), ".", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def shipped_sources() -> set[str]:
    """Every Python and data file of the package, by its path in the wheel."""
    folders = [(ROOT / "src/triptych", "triptych"), *((ROOT / name, f"triptych/{name}") for name in LINKED)]
    return {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for folder, package in folders
        for path in folder.rglob("*")  # does not follow the links, which are listed on their own
        if path.is_file() and "__pycache__" not in path.parts
        if path.suffix in {".py", *DATA} or "model" in path.relative_to(folder).parts
    }


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert shipped_sources() - names == set()
    for folder in LINKED:
        assert f"triptych/{folder}/__init__.py" in names
    assert "triptych/py.typed" in names


def test_wheel_holds_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"triptych"}
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []


def test_wheel_holds_the_demo_model(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.rsplit("/", 1)[1] for name in names if name.startswith("triptych/demo/model/")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= shipped


def test_wheel_holds_the_licence_and_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (licence,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert "Apache License" in archive.read(licence).decode()
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "triptych = triptych.cli:main" in archive.read(entry_points).decode()


def test_no_link_is_shipped(built: Path, wheel: Path) -> None:
    links = 0o120000
    assert [
        item.filename for item in zipfile.ZipFile(wheel).infolist() if item.external_attr >> 16 & 0o170000 == links
    ] == []
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive if member.issym() or member.islnk()] == []


def test_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)  # noqa: S202  # built by this test
    code = (
        "import sys, importlib\n"
        # Neither the working folder nor the editable install may lend a file.
        f"sys.path[:] = [{str(installed)!r}] + [p for p in sys.path if p and p != {str(ROOT / 'src')!r}]\n"
        "names = ['triptych', 'triptych.cli'] + ['triptych.' + name for name in "
        f"{LINKED!r}]\n"
        "for name in names:\n"
        f"    assert importlib.import_module(name).__file__.startswith({str(installed)!r}), name\n"
        "from importlib.resources import files\n"
        "print(files('triptych.demo').joinpath('model', 'config.json').is_file())\n"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "True"
