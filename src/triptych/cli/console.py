"""What the commands share: quiet libraries, stages with time, and the table style."""

from __future__ import annotations

import logging
import os
import time
import warnings
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


def quiet_libraries() -> None:
    """Keep the chatter of the libraries underneath from the user's terminal; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_LOGS", "-all")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


class Stages:
    """Shows stages as they run, with the time of each, on standard error.

    On a terminal a spinner stands before the running stage; elsewhere each finished stage is a line.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not enabled)
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._started = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._progress.stop()

    def __call__(self, stage: str) -> None:
        """Begin a stage; the one before it is done."""
        self._finish()
        self._stage, self._started = stage, time.monotonic()
        self._task = self._progress.add_task(stage, total=1)

    def _finish(self) -> None:
        if self._task is None:
            return
        self._progress.update(self._task, completed=1)
        if not self._console.is_terminal:
            self._console.print(f"{self._stage}: {time.monotonic() - self._started:.1f} s", highlight=False)
        self._task = None
