"""Target ``portable``: ExecuTorch's reference kernels, no delegate. Slow, and runs wherever ExecuTorch does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.targets.pte_target import PteTarget, refuse_quantized


@dataclass(frozen=True)
class Portable(PteTarget):
    """One ``.pte`` of aten operators only."""

    name: ClassVar[str] = "portable"

    def pipeline(self) -> str:
        """Return the legalizing pipeline."""
        return "legalize-aten"

    def check(self, recipe: Recipe) -> None:
        """Refuse quantized recipes: the portable library has no kernel for dynamically quantized linears."""
        refuse_quantized(
            self.name, recipe, "it has no kernel for the quantized linear layers", "recipe fp32, or target xnnpack"
        )
