"""A node of a graph as the place of a wrong edit, and what can be told of nodes without running them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Graph, Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.program import Method

EPSILON: Final = 1e-3
"""A number up to this one that is added to a tensor guards a division."""
RESHAPING: Final = frozenset({"alias", "clone", "contiguous", "detach", "to", "_to_copy", "view", "reshape"})
"""Operators whose result has the values of their input where the dtype stays."""
EVEN: Final = frozenset({"abs", "cos"})

Make = Callable[[GraphEditor], Node]
"""Adds nodes at the editor's insertion point and returns the last of them."""


@dataclass(frozen=True)
class Site:
    """A node of a method's graph, with what edits need to know around it.

    `state` names the program's state rows. `numbers` gives nodes of equal value the same number (`value_numbers`).
    """

    editor: GraphEditor
    method: Method
    node: Node
    state: frozenset[str]
    numbers: Mapping[Node, int]

    @property
    def operator(self) -> str:
        """The name of the operator that the node calls ("add" for aten.add.Tensor), or "" where it calls none."""
        return operator_of(self.node)

    @property
    def bound(self) -> str | None:
        """The name of the parameter, buffer or constant that the node stands for, or None."""
        return self.editor.tensor_name(self.node)

    def tensors(self) -> list[tuple[int, Node]]:
        """Return the arguments that are nodes with a tensor value, by position."""
        nodes = [(position, one) for position, one in enumerate(self.node.args) if isinstance(one, Node)]
        return [(position, one) for position, one in nodes if tensor_of(one) is not None]

    def argument(self, name: str) -> Any:
        """Return the argument called `name`, or its default; None where the operator has no such argument."""
        for position, argument in enumerate(arguments_of(self.node)):
            if argument.name == name:
                default = argument.default_value if argument.has_default_value() else None
                given = self.node.kwargs.get(name, default)
                return self.node.args[position] if position < len(self.node.args) else given
        return None

    def put(self, name: str, value: Any) -> None:
        """Give the argument called `name` another value."""
        position = [argument.name for argument in arguments_of(self.node)].index(name)
        if position < len(self.node.args):
            self.node.update_arg(position, value)
        else:
            self.node.update_kwarg(name, value)

    def put_made(self, position: int, make: Make) -> None:
        """Let argument `position` of the node be what `make` adds before it."""
        with self.editor.graph.inserting_before(self.node):
            self.node.update_arg(position, make(self.editor))

    def redirect(self, other: Node) -> None:
        """Let everything that uses the node use `other`."""
        self.node.replace_all_uses_with(other)

    def follow(self, make: Make) -> None:
        """Let everything that uses the node use what `make` adds behind it."""
        graph = self.editor.graph
        users = set(self.node.users)
        anchor = self.editor.last_placeholder if self.node.op == "placeholder" else self.node
        with graph.inserting_before(anchor.next):
            made = make(self.editor)
        self.node.replace_all_uses_with(made, delete_user_cb=lambda user: user in users)

    def rebind(self, suffix: str, value: Tensor) -> None:
        """Let everything that uses the tensor the node stands for use a new one of the value `value`."""
        self.redirect(self.editor.add_weight(f"{self.bound}_{suffix}", value))

    def namesake(self, node: Node) -> Node | None:
        """Return the next tensor of the same form with the same name in another layer, or None."""
        name = self.editor.tensor_name(node)
        if name is None:
            return None
        same = [
            one
            for one in self.editor.graph.nodes
            if form_of(one) == form_of(node)
            and (other := self.editor.tensor_name(one)) is not None
            and _without_numbers(other) == _without_numbers(name)
        ]
        return same[(same.index(node) + 1) % len(same)] if len(same) > 1 else None


def value_numbers(graph: Graph) -> dict[Node, int]:
    """Number the nodes so that two with the same number have the same value.

    Conversions that change nothing, products with 1, sums with an epsilon (which only guards a division), a single
    tensor joined and transposes taken back have the number of their input.
    """
    numbers: dict[Node, int] = {}
    known: dict[Any, int] = {}
    for node in graph.nodes:
        same = _unchanged_input(node)
        if same is not None:
            numbers[node] = numbers[same]
            continue
        is_pure = isinstance(node.target, torch._ops.OpOverload) and not writes(node)
        arguments = torch.fx.map_arg((node.args, dict(node.kwargs)), lambda used: f"#{numbers[used]}")
        key = (node.target, str(arguments)) if is_pure else node
        numbers[node] = known.setdefault(key, len(known))
    return numbers


def _unchanged_input(node: Node) -> Node | None:
    first = node.args[0] if node.args else None
    if operator_of(node) == "cat" and isinstance(first, (list, tuple)) and len(first) == 1:
        first = first[0]
        return first if isinstance(first, Node) else None
    if not isinstance(first, Node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name, others = operator_of(node), node.args[1:]
    if name == "transpose" and first.target is node.target and first.args[1:] == others:
        inner = first.args[0]
        return inner if isinstance(inner, Node) else None
    is_neutral = (name in ("mul", "div") and others == (1.0,)) or (name in ("add", "sub") and others == (0.0,))
    unchanged = name in RESHAPING or is_neutral or adds_epsilon(node)
    return first if unchanged and form_of(node) == form_of(first) else None


# ---------------------------------------------------------------------------------------------------- what nodes are


def operator_of(node: Node) -> str:
    """Return the name of the operator that `node` calls, without namespace and overload, or ""."""
    target = node.target
    return str(target._schema.name).partition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def arguments_of(node: Node) -> list[Any]:
    """Return what the schema of the operator that `node` calls says of its arguments."""
    return list(node.target._schema.arguments) if isinstance(node.target, torch._ops.OpOverload) else []


def writes(node: Node) -> bool:
    """True where the operator that `node` calls changes an argument in place."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def tensor_of(node: Node) -> Tensor | None:
    """Return the fake value of `node` where it is a tensor."""
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def is_float(node: Node) -> bool:
    """True where the value of `node` is a floating-point tensor."""
    value = tensor_of(node)
    return value is not None and value.is_floating_point()


def form_of(node: Node) -> tuple[str, torch.dtype] | None:
    """Return shape and dtype; symbolic sizes are compared as text, so that no comparison becomes a guard."""
    value = tensor_of(node)
    return None if value is None else (str(tuple(value.shape)), value.dtype)


def adds_epsilon(node: Node) -> bool:
    """True where `node` adds a number that only guards a division."""
    added: object = node.args[1] if operator_of(node) == "add" and len(node.args) > 1 else None
    return isinstance(added, float) and 0 < added <= EPSILON


def is_even(node: Node) -> bool:
    """True where the result of `node` does not depend on the sign of its input."""
    name = operator_of(node)
    return name in EVEN or (name == "pow" and node.args[1] in (2, 2.0))


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)
