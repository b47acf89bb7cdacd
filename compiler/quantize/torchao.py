"""Carrying out a recipe with torchao's ``quantize_``."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import nn

from triptych.compiler.model import Model
from triptych.compiler.quantize.recipes import EmbeddingFormat, LinearFormat, Recipe, check, planned
from triptych.errors import RecipeError


def quantize(model: Model, recipe: Recipe, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Quantize the modules of `model` that `recipe` names and `wanted` lets through, in place.

    Weights become plain buffers and parameters again afterwards (values, scales, zero points), so programs hold
    no tensor subclass. Raises `RecipeError` for a layer the recipe cannot take and where torchao is missing.
    """
    check(model, recipe)
    try:
        from torchao.quantization import quantize_
        from torchao.utils import unwrap_tensor_subclass
    except ImportError as error:
        raise RecipeError(f"recipe {recipe.name} needs torchao ({error}); install triptych[executorch]") from error
    for name, module, form in list(planned(model, recipe)):
        if not wanted(name):
            continue
        config = _config(form)
        # quantize_ speaks of children, so each module goes in under a parent of its own.
        quantize_(nn.ModuleList([module]), config, filter_fn=lambda child, _, module=module: child is module)
        if isinstance(form, LinearFormat):
            _round_scales(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        unwrap_tensor_subclass(model.module)


def _round_scales(module: nn.Module) -> None:
    """Round a linear's weight scales to bfloat16 values, so that a kernel that stores them so loses nothing.

    XNNPACK's blockwise 4-bit kernels do (`xnn_datatype_qbint4` takes bfloat16 scales).
    """
    scale: torch.Tensor = module.get_parameter("weight").scale  # type: ignore[attr-defined]
    scale.copy_(scale.to(torch.bfloat16))


def _config(form: LinearFormat | EmbeddingFormat) -> object:
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    dtype = getattr(torch, f"int{form.weight_bits}")
    if isinstance(form, LinearFormat):
        return Int8DynamicActivationIntxWeightConfig(
            weight_dtype=dtype,
            weight_granularity=PerGroup(form.group_size),
            # The plain symmetric mapping clips the largest positive weight of every group.
            weight_mapping_type=MappingType.SYMMETRIC_NO_CLIPPING_ERR,
        )
    return IntxWeightOnlyConfig(weight_dtype=dtype, granularity=PerAxis(0))
