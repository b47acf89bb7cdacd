"""Checking of tensors against the signatures of a manifest, before an engine sees them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from triptych.errors import ArtifactError, RunError
from triptych.manifest import Dim, DynamicDim, MethodSignature, TensorSignature


def dtype_named(name: str) -> torch.dtype:
    """Return torch's dtype of that name ("float32"); raises `ArtifactError` where torch has none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ArtifactError(f"the manifest names dtype {name!r}, which torch {torch.__version__} does not have")
    return dtype


def shape_text(shape: tuple[Dim, ...]) -> str:
    """Return a shape as text, a dynamic dimension as ``S=1..512``."""
    return (
        "["
        + ", ".join(f"{d.name}={d.minimum}..{d.maximum}" if isinstance(d, DynamicDim) else str(d) for d in shape)
        + "]"
    )


def check_inputs(method: str, signature: MethodSignature, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return `tensors` in signature order; raises `RunError` naming the input, what it got and what it expects."""
    expected = [port.name for port in signature.inputs]
    if tensors.keys() != set(expected):
        got = ", ".join(tensors) or "none"
        raise RunError(f"{method} takes the inputs {', '.join(expected)}; it got {got}")
    sizes: dict[str, tuple[str, int]] = {}
    ordered = []
    for port in signature.inputs:
        tensor = tensors[port.name]
        _check_tensor(method, port, tensor)
        for dim, size in zip(port.shape, tensor.shape, strict=True):
            if isinstance(dim, DynamicDim):
                first, known = sizes.setdefault(dim.name, (port.name, size))
                if known != size:
                    raise RunError(
                        f"{method}: dimension {dim.name} is {known} in {first} and {size} in {port.name}; "
                        "both must be equal in one call"
                    )
        ordered.append(tensor)
    return ordered


def _check_tensor(method: str, port: TensorSignature, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise RunError(f"{method}: input {port.name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype is not dtype_named(port.dtype):
        raise RunError(f"{method}: input {port.name} has dtype {tensor.dtype}, expected torch.{port.dtype}")
    fits = tensor.dim() == len(port.shape) and all(
        dim.minimum <= size <= dim.maximum if isinstance(dim, DynamicDim) else size == dim
        for dim, size in zip(port.shape, tensor.shape, strict=True)
    )
    if not fits:
        got = list(tensor.shape)
        raise RunError(f"{method}: input {port.name} has shape {got}, expected {shape_text(port.shape)}")
