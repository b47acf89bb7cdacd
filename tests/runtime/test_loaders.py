import dataclasses
import struct
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from triptych.errors import ArtifactError, UsageError
from triptych.manifest import Manifest, ProgramFile
from triptych.runtime import loaders
from triptych.runtime.composite import CompositeRunner
from triptych.runtime.fake import FakeRunner, fake_manifest
from triptych.runtime.loaders.executorch import check_header

PTE = struct.Struct("<4s4s4sIQQQ")


def load_fake(_folder: Path, program: ProgramFile, manifest: Manifest, _threads: int | None) -> FakeRunner:
    """The third-party loader of these tests; it serves only the program's own methods."""
    methods = {name: manifest.methods[name] for name in program.methods}
    return FakeRunner(dataclasses.replace(manifest, methods=methods))


def register(monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    points = [EntryPoint(name, value, loaders.ENTRY_POINT_GROUP) for name, value in names.items()]
    monkeypatch.setattr(loaders, "entry_points", lambda group: points)


def with_engine(engine: str) -> Manifest:
    manifest = fake_manifest()
    return dataclasses.replace(manifest, programs=(dataclasses.replace(manifest.programs[0], engine=engine),))


def test_third_party_engine_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, fake=f"{__name__}:load_fake")
    manifest = fake_manifest()
    with pytest.raises(ArtifactError, match=r"lacks fake\.program"):
        loaders.load_runner(tmp_path, manifest)
    (tmp_path / "fake.program").touch()
    assert loaders.load_runner(tmp_path, manifest).methods == tuple(manifest.methods)


def test_several_program_files_make_a_composite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, fake=f"{__name__}:load_fake")
    manifest = fake_manifest()
    rest = tuple(name for name in manifest.methods if name != "decode")
    programs = (ProgramFile("fake.program", "fake", ("decode",)), ProgramFile("b", "fake", rest))
    for program in programs:
        (tmp_path / program.file).touch()
    runner = loaders.load_runner(tmp_path, dataclasses.replace(manifest, programs=programs))
    assert isinstance(runner, CompositeRunner)
    assert set(runner.methods) == set(manifest.methods)


def test_unknown_engine_names_what_would_provide_it(tmp_path: Path) -> None:
    with pytest.raises(
        ArtifactError, match=r"needs the engine 'abacus'; known are eager, executorch.*triptych\.loaders"
    ):
        loaders.load_runner(tmp_path, with_engine("abacus"))


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "executorch.extension.pybindings", None)
    head = PTE.pack(b"\0" * 4, b"ET12", b"eh00", 32, 40, 0, 0)
    (tmp_path / "fake.program").write_bytes(head)
    with pytest.raises(ArtifactError, match=r"pip install 'triptych\[executorch\]'"):
        loaders.load_runner(tmp_path, with_engine("executorch"))


def test_a_name_claimed_twice_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, eager="somewhere.else:load")
    with pytest.raises(
        UsageError, match=r"'eager': triptych\.runtime\.loaders\.eager:load_eager and somewhere\.else:load"
    ):
        loaders.loader_names()


def test_impossible_threads(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threads is 0"):
        loaders.load_runner(tmp_path, fake_manifest(), threads=0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no ExecuTorch program"),
        (b"PK\3\4" * 20, "no ExecuTorch program"),
        (b"\0\0\0\0ET99" + bytes(60), "bytes 4 to 8 are b'ET99', expected b'ET12'"),
        (b"\0\0\0\0ET12eh00", "is truncated"),
        (PTE.pack(b"\0" * 4, b"ET12", b"eh00", 32, 100, 128, 900) + bytes(500), "540 bytes, its header says 1028"),
    ],
)
def test_broken_pte_files_never_reach_the_native_loader(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "program.pte"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        check_header(path)
    assert "\n" not in str(caught.value)


def test_damage_behind_the_header_is_one_error_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("executorch")
    data = PTE.pack(b"\x3c\0\0\0", b"ET12", b"eh00", 32, 600, 0, 0) + bytes(560)
    (tmp_path / "fake.program").write_bytes(data)
    with pytest.raises(ArtifactError, match="does not load in ExecuTorch") as caught:
        loaders.load_runner(tmp_path, with_engine("executorch"))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_loaders_import_no_engine() -> None:
    code = "import sys, triptych.runtime.loaders; print([m for m in sys.modules if m.split('.')[0] == 'executorch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
