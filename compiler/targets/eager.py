"""Target ``eager``: the captured program itself, run by torch. The oracle of every other target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from triptych.compiler.program import Program
from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.storage import PROGRAM_FILE, save
from triptych.compiler.targets.base import Emission, Target
from triptych.manifest import Manifest, ProgramFile

FOLDER: Final = "eager"


@dataclass(frozen=True)
class _ProgramFolder:
    program: Program

    def write(self, folder: Path) -> None:
        save(self.program, folder / FOLDER)


@dataclass(frozen=True)
class Eager(Target):
    """Legalizes to aten, so running needs torch and none of our modules."""

    name: ClassVar[str] = "eager"
    engine: ClassVar[str] = "eager"

    def pipeline(self) -> str:
        """Return the legalizing pipeline."""
        return "legalize-aten"

    def check(self, recipe: Recipe) -> None:
        """Take every recipe: quantized arithmetic is ordinary aten here."""

    def program_files(self, program: Program) -> tuple[ProgramFile, ...]:
        """Announce the one program folder, by its table file."""
        return (ProgramFile(f"{FOLDER}/{PROGRAM_FILE}", self.engine, tuple(program.methods)),)

    def emit(self, program: Program, manifest: Manifest, report: Callable[[str], None]) -> Emission:
        """Keep the program; there is nothing to lower."""
        return _ProgramFolder(program)
