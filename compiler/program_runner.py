"""Running what is not lowered yet: the methods of a captured program, and the entry points of a model.

Both play call traces, so the oracle judges every stage of a compilation as it judges an artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from triptych.compiler.capture import bound_forward
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


class ProgramRunner:
    """Runs a program's graphs in eager torch, over a copy of its state; the program stays as it is."""

    def __init__(self, program: Program) -> None:
        self._initial = {name: row.initial for name, row in program.state.items()}
        self._methods = dict(program.methods)
        self._state = {name: tensor.clone() for name, tensor in self._initial.items()}
        self._bound = {name: self._tensors_of(method) for name, method in program.methods.items()}

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
            results = chosen.exported.graph_module(*arguments)
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
