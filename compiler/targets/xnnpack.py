"""Target ``xnnpack``: one ``.pte`` whose linear algebra runs in XNNPACK delegates, attention in ``llama::`` kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from triptych.compiler.program import Program
from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.targets.pte_target import PteTarget
from triptych.errors import RecipeError


@dataclass(frozen=True)
class Xnnpack(PteTarget):
    """CPU inference with XNNPACK; one partitioner serves float and quantized layers."""

    name: ClassVar[str] = "xnnpack"

    def pipeline(self) -> str:
        """Return the legalizing pipeline."""
        return "legalize-executorch,expand-tanh-gelu,expand-norms,mean-as-linear,expand-splits,infer-view-sizes"

    def check(self, recipe: Recipe) -> None:
        """Refuse groups that XNNPACK cannot take: 4-bit weights in groups of a multiple of 32."""
        for component, form in recipe.linear.items():
            if form.weight_bits == 4 and form.group_size % 32 != 0:
                raise RecipeError(
                    f"target xnnpack cannot lower recipe {recipe.name}: group size {form.group_size} of {component} "
                    "is no multiple of 32; use recipe 8da4w"
                )

    def partitioner(self, program: Program) -> Any:
        """Return XNNPACK's partitioner for float and quantized layers alike."""
        from triptych.compiler.targets.partitioners import WatchedXnnpack

        return WatchedXnnpack()
