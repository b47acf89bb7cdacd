"""Target ``portable``: ExecuTorch's reference kernels, no delegate. Slow, and runs wherever ExecuTorch does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.program import Program
from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.targets.base import Emission, Target
from triptych.errors import RecipeError
from triptych.manifest import Manifest, ProgramFile


@dataclass(frozen=True)
class Portable(Target):
    """One ``.pte`` of aten operators only."""

    name: ClassVar[str] = "portable"
    engine: ClassVar[str] = "executorch"

    def pipeline(self) -> str:
        """Return the legalizing pipeline."""
        return "legalize-aten"

    def check(self, recipe: Recipe) -> None:
        """Refuse quantized recipes: the portable library has no kernel for dynamically quantized linears."""
        if not recipe.is_float:
            layers = ", ".join(sorted(recipe.linear))
            raise RecipeError(
                f"target portable cannot lower recipe {recipe.name}: it has no kernel for the quantized linear layers "
                f"of {layers}; use recipe fp32, or target xnnpack"
            )

    def program_files(self, program: Program) -> tuple[ProgramFile, ...]:
        """Announce ``model.pte``."""
        from triptych.compiler.targets.executorch import PTE_FILE

        return (ProgramFile(PTE_FILE, self.engine, tuple(program.methods)),)

    def emit(self, program: Program, manifest: Manifest, report: Callable[[str], None]) -> Emission:
        """Lower without partitioners."""
        from triptych.compiler.targets.executorch import lower

        return lower(program, manifest, [], report)
