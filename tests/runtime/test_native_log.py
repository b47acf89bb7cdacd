import os
import sys

import pytest

from triptych.runtime.native_log import caught_stderr


def test_passes_on_all_but_noise(capfd: pytest.CaptureFixture[str]) -> None:
    with caught_stderr(("[noise",)) as lines:
        os.write(2, b"[noise] a\n[error] b\n")
        sys.stderr.write("[noise] c\n")
        os.write(2, b"[error] d\n")
    assert lines == ["[noise] a", "[error] b", "[noise] c", "[error] d"]
    assert capfd.readouterr().err == "[error] b\n[error] d\n"
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "afterwards\n"


def test_a_failing_block_leaves_the_lines_to_its_handler(capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []

    def fail() -> None:
        nonlocal lines
        with caught_stderr(()) as lines:
            os.write(2, b"why\n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert lines == ["why"]
    assert capfd.readouterr().err == ""
