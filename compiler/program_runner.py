"""Running what is not lowered yet: the methods of a captured program, and the entry points of a model.

Both play call traces, so the oracle judges every stage of a compilation as it judges an artifact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from triptych.compiler.capture import bound_forward
from triptych.compiler.derived_weights import storage_place
from triptych.compiler.editing import bound_names, bound_tensor
from triptych.compiler.model import EntryPoint, Model
from triptych.compiler.program import Method, Program
from triptych.errors import TriptychError, VerificationError
from triptych.modules.routing import HANDLER_NAME


@contextmanager
def _failures_named(method: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn whatever torch raises inside into one `VerificationError` with the method and the shapes it was given."""
    try:
        yield
    except TriptychError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise VerificationError(f"{method} fails on inputs of {shapes}: {reason}", method=method) from error


class _DequantizedOnce(Interpreter):
    """Runs a graph, and keeps the floats that quantized weights stand for: every call needs the same ones."""

    def __init__(self, method: Method, weights: Collection[str], kept: dict[Any, Tensor]) -> None:
        super().__init__(method.exported.graph_module)
        self._kept = kept
        names = bound_names(method.exported)
        self._of_weights = {
            node
            for node in method.exported.graph.nodes
            if str(node.target).startswith("torchao.dequantize")
            and all(names.get(used.name) in weights for used in node.all_input_nodes)
        }

    @property
    def is_needed(self) -> bool:
        """True where the graph has quantized weights."""
        return bool(self._of_weights)

    def run_node(self, n: Node) -> Any:
        """Run a node, or take what an earlier call computed from the same elements of the same weights."""
        if n not in self._of_weights:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        parts = [storage_place(one) if isinstance(one, Tensor) else str(one) for one in (*args, *kwargs.items())]
        key = (n.target, *parts)
        if key not in self._kept:
            self._kept[key] = super().run_node(n)
        return self._kept[key]


class ProgramRunner:
    """Runs a program's graphs in eager torch, over a copy of its state; the program stays as it is.

    It holds the weights of quantized programs as floats once they were used.
    """

    def __init__(self, program: Program) -> None:
        self._initial = {name: row.initial for name, row in program.state.items()}
        self._methods = dict(program.methods)
        self._state = {name: tensor.clone() for name, tensor in self._initial.items()}
        self._bound = {name: self._tensors_of(method) for name, method in program.methods.items()}
        weights = {use.name for weight in program.weights.values() for use in weight.uses}
        kept: dict[Any, Tensor] = {}
        self._quantized = {name: _DequantizedOnce(method, weights, kept) for name, method in self._methods.items()}

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The live state rows."""
        return self._state

    @property
    def methods(self) -> Mapping[str, str]:
        """Role → name of the method that has it."""
        return {str(role): name for name, method in self._methods.items() for role in method.roles}

    def run(self, method: str, **tensors: Tensor) -> dict[str, Tensor]:
        """Run a method on inputs by name and return its outputs by name."""
        chosen = self._methods[method]
        arguments = [*self._bound[method], *(tensors[port.name] for port in chosen.inputs)]
        with _failures_named(method, tensors), torch.no_grad():
            quantized = self._quantized[method]
            results = quantized.run(*arguments) if quantized.is_needed else chosen.exported.graph_module(*arguments)
        return {port.name: value for port, value in zip(chosen.outputs, results, strict=True)}

    def reset_state(self) -> None:
        """Put the initial state back."""
        for name, tensor in self._state.items():
            tensor.copy_(self._initial[name])

    def _tensors_of(self, method: Method) -> list[Any]:
        """Return the tensors of the lifted placeholders, in their order, state in its live copy."""
        names = bound_names(method.exported)
        placeholders = [node.name for node in method.exported.graph.nodes if node.op == "placeholder"]
        return [
            self._state[names[one]] if names[one] in self._state else bound_tensor(method.exported, names[one])
            for one in placeholders
            if one in names
        ]


class ModelRunner:
    """Runs a model's entry points before capture, over a copy of its modules and buffers.

    State are the buffers that calls have changed since the last reset.
    """

    def __init__(self, model: Model) -> None:
        own = model.with_own_modules()
        own.module.eval()
        copies: dict[int, Tensor] = {}
        for module in own.module.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = copies.setdefault(id(buffer), buffer.clone())
        self._module = own.module
        self._entries: dict[str, EntryPoint] = {
            entry.name: entry.resolved(own.metadata.max_context) for entry in own.entry_points
        }
        self._initial = {name: buffer.clone() for name, buffer in self._module.named_buffers()}

    @property
    def has_cache(self) -> bool:
        """True where some attention has a key-value cache, so that decoding can go on from a prefill."""
        return any(HANDLER_NAME in name.split(".") for name in self._initial)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The live buffers that differ from their initial values."""
        buffers = dict(self._module.named_buffers())
        return {name: buffers[name] for name, value in self._initial.items() if not torch.equal(buffers[name], value)}

    @property
    def methods(self) -> Mapping[str, str]:
        """Role → name of the entry point that has it."""
        return {str(role): name for name, entry in self._entries.items() for role in entry.roles}

    def run(self, method: str, **tensors: Tensor) -> dict[str, Tensor]:
        """Run an entry point on inputs by name and return its outputs by name."""
        entry = self._entries[method]
        with _failures_named(method, tensors), torch.no_grad():
            results = bound_forward(self._module, entry)(*(tensors[port.name] for port in entry.inputs))
        outputs = results if isinstance(results, (tuple, list)) else (results,)
        return {port.name: value for port, value in zip(entry.outputs, outputs, strict=True)}

    def reset_state(self) -> None:
        """Put the initial buffers back."""
        for name, buffer in self._module.named_buffers():
            buffer.copy_(self._initial[name])
