"""Neutral operators that passes speak and targets legalize.

Positions come as a tensor, so no program needs a data-dependent integer before its target asks for one. Each operator
is composite: its reference kernel is its meaning on every device, under fake tensors and under autograd, and tracing
the kernel is its legalization to aten.

=======================================  ==================================================================
operator                                 ExecuTorch
=======================================  ==================================================================
``triptych::update_cache``               ``llama::update_cache``
``triptych::cached_sdpa``                ``llama::custom_sdpa``
``triptych::update_ring_cache``          ``llama::update_cache`` at one position, else gather and copy
``triptych::ring_sdpa``                  ``llama::custom_sdpa``, masked unless at one position
``triptych::update_quantized_cache``     ``llama::update_cache`` of integers and of scales
``triptych::quantized_cached_sdpa``      ``llama::custom_sdpa`` over dequantized slots
``triptych::quantized_embedding``        ``quantized_decomposed::embedding_byte`` or ``embedding_4bit``
=======================================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from triptych.modules.operators.attention import cached_sdpa, quantized_cached_sdpa, ring_sdpa
from triptych.modules.operators.cache import update_cache, update_quantized_cache, update_ring_cache
from triptych.modules.operators.embedding import quantized_embedding

NAMESPACE: Final = "triptych"

_SCHEMAS: Final[dict[str, Callable[..., Any]]] = {
    "update_cache(Tensor(a!) cache, Tensor value, Tensor start_pos) -> ()": update_cache,
    "cached_sdpa(Tensor query, Tensor key, Tensor value, Tensor start_pos, float? scale=None, *, "
    "Tensor? attn_mask=None, int? window=None, float? softcap=None) -> Tensor": cached_sdpa,
    "update_ring_cache(Tensor(a!) cache, Tensor value, Tensor start_pos, int sink=0) -> ()": update_ring_cache,
    "ring_sdpa(Tensor query, Tensor key, Tensor value, Tensor ring_keys, Tensor ring_values, Tensor start_pos, "
    "int sink=0, float? scale=None, *, float? softcap=None) -> Tensor": ring_sdpa,
    "update_quantized_cache(Tensor(a!) cache, Tensor(b!) scales, Tensor value, Tensor start_pos) -> ()": (
        update_quantized_cache
    ),
    "quantized_cached_sdpa(Tensor query, Tensor key, Tensor key_scales, Tensor value, Tensor value_scales, "
    "Tensor start_pos, float? scale=None, *, int? window=None, float? softcap=None) -> Tensor": quantized_cached_sdpa,
    "quantized_embedding(Tensor weight, Tensor scales, Tensor indices) -> Tensor": quantized_embedding,
}

_library = torch.library.Library(NAMESPACE, "DEF")


def _define(schema: str, kernel: Callable[..., Any]) -> Any:
    """Register an operator and return its overload."""
    name = _library.define(schema)
    _library.impl(name, kernel, "CompositeImplicitAutograd")
    return getattr(torch.ops.triptych, name).default


REFERENCE_KERNELS: Final[dict[Any, Callable[..., Any]]] = {
    _define(schema, kernel): kernel for schema, kernel in _SCHEMAS.items()
}
"""The function that defines each operator; legalization to aten traces it."""
