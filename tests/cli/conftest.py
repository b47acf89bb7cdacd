"""The command line, run in this process with its output caught at the file descriptors."""

import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from triptych.cli import main

STAGE = re.compile(r"^[\w ,.-]+: \d+\.\d s$")


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; everything else on standard error must be a finished stage with its time."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        assert errors[0] == lines[-1]
        assert not [line for line in lines[:-1] if not STAGE.match(line)], self.err
        assert "Traceback" not in self.out + self.err
        return errors[0]


Command = Callable[..., Outcome]


@pytest.fixture
def triptych(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Return a function that runs `triptych` with these arguments."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, captured.out, captured.err)

    yield run
    logging.disable(logging.NOTSET)
