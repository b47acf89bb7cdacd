"""What a native library writes to standard error while it loads: caught, read, and passed on if it matters."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr


@contextmanager
def caught_stderr(noise: tuple[str, ...]) -> Iterator[list[str]]:
    """Collect lines that native code writes to standard error inside the block.

    Both ways are caught: file descriptor 2, and `sys.stderr`, to which bindings may redirect C++ streams. Yields
    a list that holds the lines once the block ends. A block that ends well passes on every line that begins with
    none of `noise`; one that raises passes on nothing, for the handler has the lines to report.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", buffering=1) as file:
        try:
            with redirect_stderr(file), _descriptor_redirected(file.fileno()):
                yield lines
        finally:
            file.flush()
            file.seek(0)
            lines += file.read().splitlines()
    for line in lines:
        if sys.stderr is not None and not line.startswith(noise):
            sys.stderr.write(f"{line}\n")


@contextmanager
def _descriptor_redirected(target: int) -> Iterator[None]:
    """Let file descriptor 2 write to `target`; a process that has closed it has nothing to redirect."""
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
