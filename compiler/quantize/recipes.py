"""Recipes: which part of a model is stored and computed in which format.

A recipe is a typed value; targets say whether they can lower it before any work starts, and a layer that a
recipe cannot take is named with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import nn

from triptych.compiler.model import Model
from triptych.errors import RecipeError


@dataclass(frozen=True)
class LinearFormat:
    """Linear layers: `weight_bits` symmetric in groups of `group_size` inputs, activations int8 per row and call."""

    weight_bits: int
    group_size: int


@dataclass(frozen=True)
class EmbeddingFormat:
    """Embeddings: `weight_bits` per row of the table."""

    weight_bits: int


@dataclass(frozen=True)
class Recipe:
    """Formats by component of `triptych.compiler.model.Metadata.components`; what is not named stays float32."""

    name: str
    description: str
    linear: dict[str, LinearFormat]
    embedding: EmbeddingFormat | None

    @property
    def is_float(self) -> bool:
        """True where the recipe changes nothing."""
        return not self.linear and self.embedding is None


FP32: Final = Recipe("fp32", "everything in float32", {}, None)
INT8_DYNAMIC_INT4_WEIGHT: Final = Recipe(
    "8da4w",
    "decoder linears and lm_head: 4-bit weights in groups of 32 with dynamic int8 activations; embedding: int8",
    {"decoder": LinearFormat(4, 32), "lm_head": LinearFormat(4, 32)},
    EmbeddingFormat(8),
)
RECIPES: Final = {recipe.name: recipe for recipe in (FP32, INT8_DYNAMIC_INT4_WEIGHT)}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`; raises `RecipeError` naming the known ones."""
    if name not in RECIPES:
        raise RecipeError(f"no recipe is called {name!r}; known: {', '.join(RECIPES)}")
    return RECIPES[name]


def component_of(model: Model, name: str) -> str:
    """Return the component that the module `name` belongs to (the longest prefix wins), "" for none."""
    best, length = "", -1
    for component, prefixes in model.metadata.components.items():
        for prefix in prefixes:
            if (name == prefix or name.startswith(f"{prefix}.")) and len(prefix) > length:
                best, length = component, len(prefix)
    return best


def planned(model: Model, recipe: Recipe) -> Iterator[tuple[str, nn.Module, LinearFormat | EmbeddingFormat]]:
    """Yield the modules that `recipe` changes in `model`, each with its format."""
    for name, module in model.module.named_modules():
        component = component_of(model, name)
        if isinstance(module, nn.Linear) and component in recipe.linear:
            yield name, module, recipe.linear[component]
        elif isinstance(module, nn.Embedding) and component == "embedding" and recipe.embedding is not None:
            yield name, module, recipe.embedding


def check(model: Model, recipe: Recipe) -> None:
    """Raise `RecipeError` naming the first layer that `recipe` cannot take, and the nearest recipe that would do."""
    if recipe.is_float:
        return
    if not model.metadata.components:
        raise RecipeError(f"recipe {recipe.name} speaks of components and the model description names none; use fp32")
    for name, module, form in planned(model, recipe):
        if (
            isinstance(form, LinearFormat)
            and isinstance(module, nn.Linear)
            and module.in_features % form.group_size != 0
        ):
            raise RecipeError(
                f"recipe {recipe.name} cannot take layer {name}: its {module.in_features} inputs are no multiple of "
                f"the group size {form.group_size}; use fp32"
            )
