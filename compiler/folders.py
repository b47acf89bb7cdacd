"""Folders that exist whole or not at all: written beside their place and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triptych.errors import ArtifactError


def check_replaceable(destination: Path, marker: str, kind: str) -> None:
    """Raise `ArtifactError` where `destination` holds something else than a `kind`, which has a file `marker`."""
    if destination.is_dir():
        if any(destination.iterdir()) and not (destination / marker).is_file():
            raise ArtifactError(f"{destination} exists and is no {kind}; choose another folder or empty it")
    elif destination.exists():
        raise ArtifactError(f"{destination} exists and is no folder; choose another path")


@contextmanager
def folder_beside(destination: Path) -> Iterator[Path]:
    """Give a fresh folder that takes `destination`'s place when the block ends, and vanishes when it fails.

    Whenever this is interrupted, the old folder or none is left; what killed processes left is swept up by the next.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    _sweep(destination)
    folder = destination.with_name(f".{destination.name}.new-{os.getpid()}")
    old = destination.with_name(f".{destination.name}.old-{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        if destination.exists():
            destination.rename(old)
        folder.rename(destination)
    except BaseException:
        if old.exists() and not destination.exists():
            old.rename(destination)
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sweep(destination: Path) -> None:
    """Remove what killed processes left beside `destination`; bring back a folder that was half replaced."""
    for kind in ("old", "new"):
        for left in destination.parent.glob(f".{destination.name}.{kind}-*"):
            pid = left.name.rpartition("-")[2]
            # The own number is a leftover of another process that had it: this one has not begun yet.
            if not pid.isdigit() or (int(pid) != os.getpid() and _is_running(int(pid))):
                continue
            if kind == "old" and not destination.exists():
                left.rename(destination)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
