"""Capture: from a described module to a `Program`, one `torch.export` a method over one module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._sympy.value_ranges import bound_sympy

from triptych.compiler.editing import tidied
from triptych.compiler.model import EntryPoint, Model, OutputPort
from triptych.compiler.program import Method, Program
from triptych.errors import ModelError, TriptychError, VerificationError
from triptych.manifest import Dim as PortDim
from triptych.manifest import DynamicDim, TensorSignature
from triptych.modules.position import sequence_position


class _EntryModule(nn.Module):
    """The user's module with another forward: it shares every registry, so names and tensors are the same."""

    def __init__(self, module: nn.Module, entry: EntryPoint) -> None:
        super().__init__()
        self._modules = module._modules
        self._parameters = module._parameters
        self._buffers = module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self.training = module.training
        self.forward = bound_forward(module, entry)


def bound_forward(module: nn.Module, entry: EntryPoint) -> Callable[..., Any]:
    """Return `entry`'s forward over `module`: a function of the declared inputs, with the position announced."""
    names = [port.name for port in entry.inputs]

    def forward(*inputs: Tensor) -> Any:
        start_pos = dict(zip(names, inputs, strict=True)).get("start_pos")
        with sequence_position(start_pos):
            return entry.forward(module, *inputs)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def capture(model: Model, report: Callable[[str], None] = lambda name: None) -> Program:
    """Export every entry point of `model`; `report` is called with each method's name before its turn.

    Raises `ModelError` naming the entry point that does not export.
    """
    own = model.with_own_modules()
    own.module.eval()
    methods: dict[str, Method] = {}
    for entry in own.entry_points:
        report(entry.name)
        methods[entry.name] = _capture_entry_point(own.module, entry.resolved(own.metadata.max_context))
    return Program.build(methods, own.metadata)


def _capture_entry_point(module: nn.Module, entry: EntryPoint) -> Method:
    dims: dict[str, Any] = {}
    dynamic_shapes = tuple(_dynamic_axes(port, dims) for port in entry.inputs)
    try:
        with torch.no_grad():
            exported = torch.export.export(
                _EntryModule(module, entry), entry.example_inputs(), dynamic_shapes=dynamic_shapes, strict=False
            )
    except TriptychError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"entry point {entry.name!r} of {type(module).__name__} does not export: {reason}; "
            "see the chained error for the line"
        ) from error
    exported = tidied(exported)
    return Method(exported, entry.roles, entry.inputs, output_signatures(exported, entry.outputs, entry.inputs))


def _dynamic_axes(port: TensorSignature, dims: dict[str, Any]) -> dict[int, Any] | None:
    axes = {}
    for axis, dim in enumerate(port.shape):
        if isinstance(dim, DynamicDim):
            axes[axis] = dims.setdefault(dim.name, Dim(dim.name, min=dim.minimum, max=dim.maximum))
    return axes or None


def user_input_values(exported: ExportedProgram) -> dict[str, Any]:
    """Return the fake value of each user input, by name."""
    names = [spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    return {name: values[name] for name in names}


def output_signatures(
    exported: ExportedProgram, ports: tuple[OutputPort | TensorSignature, ...], inputs: tuple[TensorSignature, ...]
) -> tuple[TensorSignature, ...]:
    """Read shapes and dtypes of the user outputs off the graph; names and links come from `ports`."""
    symbols = dynamic_symbols(exported, inputs)
    values = exported.graph.output_node().args[0]
    assert isinstance(values, (tuple, list))
    outputs = [
        value
        for spec, value in zip(exported.graph_signature.output_specs, values, strict=True)
        if spec.kind == OutputKind.USER_OUTPUT
    ]
    if len(outputs) != len(ports):
        raise ModelError(
            f"the entry point returns {len(outputs)} tensors, its description names {len(ports)} "
            f"({', '.join(port.name for port in ports)}); make them agree"
        )
    found = []
    for node, port in zip(outputs, ports, strict=True):
        value = node.meta["val"] if isinstance(node, torch.fx.Node) else node
        if not isinstance(value, Tensor):
            raise VerificationError(f"output {port.name!r} is {type(value).__name__}, expected a tensor")
        shape = tuple(_port_dim(exported, size, symbols) for size in value.shape)
        found.append(TensorSignature(port.name, str(value.dtype).removeprefix("torch."), shape, port.links))
    return tuple(found)


def dynamic_symbols(exported: ExportedProgram, inputs: tuple[TensorSignature, ...]) -> dict[str, DynamicDim]:
    """Return symbol → the dynamic dimension of an input that it stands for, such as "s65" → S."""
    values = user_input_values(exported)
    return {
        str(size): dim
        for port in inputs
        for size, dim in zip(values[port.name].shape, port.shape, strict=True)
        if isinstance(dim, DynamicDim)
    }


def _port_dim(exported: ExportedProgram, size: int | torch.SymInt, symbols: Mapping[str, DynamicDim]) -> PortDim:
    if isinstance(size, int):
        return size
    if str(size) in symbols:
        return symbols[str(size)]
    bounds = bound_sympy(size.node.expr, exported.range_constraints)
    return DynamicDim(str(size), int(bounds.lower), int(bounds.upper))
