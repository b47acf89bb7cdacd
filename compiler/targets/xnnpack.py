"""Target ``xnnpack``: one ``.pte`` whose linear algebra runs in XNNPACK delegates, attention in ``llama::`` kernels."""

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
class Xnnpack(Target):
    """CPU inference with XNNPACK; one partitioner serves float and quantized layers."""

    name: ClassVar[str] = "xnnpack"
    engine: ClassVar[str] = "executorch"

    def pipeline(self) -> str:
        """Return the legalizing pipeline."""
        return "legalize-executorch,expand-tanh-gelu"

    def check(self, recipe: Recipe) -> None:
        """Refuse groups that XNNPACK cannot take: 4-bit weights in groups of a multiple of 32."""
        for component, form in recipe.linear.items():
            if form.weight_bits == 4 and form.group_size % 32 != 0:
                raise RecipeError(
                    f"target xnnpack cannot lower recipe {recipe.name}: group size {form.group_size} of {component} "
                    "is no multiple of 32; use recipe 8da4w"
                )

    def program_files(self, program: Program) -> tuple[ProgramFile, ...]:
        """Announce ``model.pte``."""
        from triptych.compiler.targets.executorch import PTE_FILE

        return (ProgramFile(PTE_FILE, self.engine, tuple(program.methods)),)

    def emit(self, program: Program, manifest: Manifest, report: Callable[[str], None]) -> Emission:
        """Lower through the XNNPACK partitioner."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

        from triptych.compiler.targets.executorch import lower

        return lower(program, manifest, [XnnpackPartitioner()], report)
