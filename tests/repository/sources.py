"""The source tree as the repository's own tests see it."""

import shutil
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]

# The folders at the root that src/triptych holds a link to.
LINKED: Final = ("benchmarks", "compiler", "modules", "passes", "runtime")


def copy_sources(to: Path) -> Path:
    """Copy the sources with their links, and what a build reads, to the new folder `to`."""
    for folder in (*LINKED, "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, to / name)
    return to
