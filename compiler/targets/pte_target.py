"""`PteTarget`: what the targets share whose artifact is one ``.pte`` file for ExecuTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from triptych.compiler.partition_explainer import PARTITION_FILE, Partition, explain
from triptych.compiler.program import Program
from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.targets.base import Emission, Target
from triptych.errors import RecipeError
from triptych.manifest import Manifest, ProgramFile


@dataclass(frozen=True)
class ExplainedPte:
    """An emitted ``.pte`` and the explanation of its partition; both are files of the artifact."""

    pte: Emission
    partition: Partition

    def write(self, folder: Path) -> None:
        """Write ``model.pte`` and ``partition.json``."""
        self.pte.write(folder)
        (folder / PARTITION_FILE).write_text(self.partition.to_json(), encoding="utf-8")


@dataclass(frozen=True)
class PteTarget(Target):
    """Base of the targets that lower through ExecuTorch; each adds its legalizing passes, recipes and partitioner."""

    engine: ClassVar[str] = "executorch"

    def partitioner(self, program: Program) -> Any | None:
        """Return a partitioner with `reasons` for `program` (see `partitioners`), or None for none.

        Raises `LoweringError` where what it needs is not installed.
        """
        return None

    def program_files(self, program: Program) -> tuple[ProgramFile, ...]:
        """Announce ``model.pte``."""
        from triptych.compiler.targets.executorch import PTE_FILE

        return (ProgramFile(PTE_FILE, self.engine, tuple(program.methods)),)

    def emit(self, program: Program, manifest: Manifest, report: Callable[[str], None]) -> Emission:
        """Lower through the partitioner and explain what it left outside."""
        from triptych.compiler.targets.executorch import lower

        partitioner = self.partitioner(program)
        emitted = lower(program, manifest, partitioner, report)
        graphs = {name: emitted.manager.exported_program(name) for name in program.methods}
        reasons = None if partitioner is None else partitioner.reasons
        return ExplainedPte(emitted, explain(self.name, program, graphs, reasons))


def refuse_quantized(target: str, recipe: Recipe, why: str, instead: str) -> None:
    """Raise `RecipeError` for a quantized `recipe`, naming its layers, `why`, and what to use `instead`."""
    if not recipe.is_float:
        layers = ", ".join(sorted(recipe.linear))
        raise RecipeError(f"target {target} cannot lower recipe {recipe.name}: {why} of {layers}; use {instead}")
