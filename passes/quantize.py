"""``quantize``: weights and activations of the parts a recipe names change their format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.compiler.properties import QUANTIZED, Property
from triptych.compiler.quantize.recipes import find_recipe
from triptych.compiler.quantize.torchao import quantize


@dataclass(frozen=True)
class Quantize(SourceTransform):
    """Quantize with torchao.

    1. Every `nn.Linear` and `nn.Embedding` of a component that `recipe` names gets the recipe's format.
    2. A tied embedding is untied where its two uses get different formats.
    """

    name: ClassVar[str] = "quantize"
    ensures: ClassVar[frozenset[Property]] = frozenset({QUANTIZED})

    recipe: str

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Quantize in place; raises `RecipeError` for an unknown recipe or a layer it cannot take."""
        quantize(model, find_recipe(self.recipe), log.match)
        return model
