"""What a target is: options, a legalizing pipeline, and the emission of a program. The same shape as a pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Protocol

from triptych.compiler.program import Program
from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.registry import built_in_names, plugins, resolve
from triptych.compiler.targets.missing_sdk import refusal
from triptych.errors import UsageError
from triptych.manifest import Manifest, ProgramFile

TARGET_GROUP: Final = "triptych.targets"
TARGET_PACKAGE: Final = "triptych.compiler.targets"
HELPERS: Final = frozenset(
    {
        "base",
        "custom-ops",
        "edge",
        "levels",
        "executorch",
        "missing-sdk",
        "needed-passes",
        "partitioners",
        "pte",
        "pte-target",
    }
)
"""Files of the package that are no targets."""


class Emission(Protocol):
    """Program files ready to be written."""

    def write(self, folder: Path) -> None:
        """Write the files that the target announced into `folder`."""


@dataclass(frozen=True)
class Target(ABC):
    """Base of all targets; fields are options, `name` is the name on the command line."""

    name: ClassVar[str]
    engine: ClassVar[str]

    @abstractmethod
    def pipeline(self) -> str:
        """Return the text of the legalizing passes, run after the user's."""

    @abstractmethod
    def check(self, recipe: Recipe) -> None:
        """Raise `RecipeError` where this target cannot lower `recipe`, naming one that would do."""

    @abstractmethod
    def program_files(self, program: Program) -> tuple[ProgramFile, ...]:
        """Return the files `emit` will make, with the methods each holds."""

    @abstractmethod
    def emit(self, program: Program, manifest: Manifest, report: Callable[[str], None]) -> Emission:
        """Lower a legalized program; `report` hears the name of each stage. Raises `LoweringError`."""


def target_names() -> tuple[str, ...]:
    """Return every known target name, sorted."""
    return tuple(sorted({*_built_in(), *plugins(TARGET_GROUP)}))


def find_target(name: str) -> type[Target]:
    """Return the class of the target called `name`; raises `UsageError` for one that is unknown or needs an SDK."""
    if name not in target_names():
        reason = refusal(name, ", ".join(target_names()))
        if reason is not None:
            raise UsageError(reason)
    found = resolve(name, _built_in(), plugins(TARGET_GROUP), Target, "target", UsageError)
    target_class: type[Target] = found
    return target_class


def _built_in() -> dict[str, str]:
    return {name: module for name, module in built_in_names(TARGET_PACKAGE).items() if name not in HELPERS}
