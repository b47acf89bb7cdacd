"""Parts of a graph that compute the same whatever order the axes stand in, and what another order would save.

A *region* is a connected set of operators on tensors of one rank that treat all axes alike or name the axis they
mean: pointwise arithmetic with broadcasting, ``cat``, ``slice``, reductions that keep their axis, normalizations over
axes that stay last. All of it can be computed on permuted operands. That removes the permutes at its borders that the
new order cancels, and needs a permute at every other border.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.permutations import (
    Permutation,
    View,
    compose,
    inverse,
    is_identity,
    permutation_of,
    rank,
    seen_through,
)

aten = torch.ops.aten

AXIS_ARGUMENTS: Final[Mapping[object, str]] = {
    aten.amax.default: "dim",
    aten.amin.default: "dim",
    aten.cat.default: "dim",
    aten.chunk.default: "dim",
    aten.cumsum.default: "dim",
    aten.flip.default: "dims",
    aten.log_softmax.int: "dim",
    aten.mean.dim: "dim",
    aten.slice.Tensor: "dim",
    aten.softmax.int: "dim",
    aten.split.Tensor: "dim",
    aten.split_with_sizes.default: "dim",
    aten.sum.dim_IntList: "dim",
}
"""Operators that keep the number of axes, and the argument that names the axes they work along."""
REDUCTIONS: Final = frozenset({aten.amax.default, aten.amin.default, aten.mean.dim, aten.sum.dim_IntList})
NORMALIZATIONS: Final = frozenset({aten.layer_norm.default, aten.rms_norm.default})
CASTS: Final = frozenset({aten.to.device, aten.to.dtype, aten.to.dtype_layout})
COPIES: Final = frozenset({aten.clone.default, aten.contiguous.default})
POINTWISE: Final = frozenset({aten.masked_fill.Scalar, aten.masked_fill.Tensor, *CASTS})
"""Pointwise operators that torch does not tag as such."""


def is_member(node: Node) -> bool:
    """True where `node` can be computed on operands whose axes stand in another order."""
    if node.op != "call_function" or not rank(node):
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and is_member(source)
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable or not node.all_input_nodes:
        return False
    if target in REDUCTIONS:
        return bool(argument(node, "keepdim"))
    if target in COPIES:
        return node.kwargs.get("memory_format") in (None, torch.contiguous_format, torch.preserve_format)
    if target in AXIS_ARGUMENTS or target in NORMALIZATIONS or target is aten.expand.default:
        return rank(node.all_input_nodes[0]) == rank(node)
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return target in POINTWISE or (torch.Tag.pointwise in target.tags and not is_random)


def argument(node: Node, name: str) -> Any:
    """Return the argument `name` of a call, or its default."""
    assert isinstance(node.target, OpOverload)
    for position, one in enumerate(node.target._schema.arguments):
        if one.name == name:
            if name in node.kwargs:
                return node.kwargs[name]
            if position < len(node.args):
                return node.args[position]
            return one.default_value if one.has_default_value() else None
    return None


def regions(editor: GraphEditor) -> Iterator[Region]:
    """Yield the connected regions of the graph in the order of their first nodes."""
    members = {node: None for node in editor.graph.nodes if is_member(node)}
    seen: set[Node] = set()
    for start in members:
        if start in seen:
            continue
        found, waiting = {start}, [start]
        while waiting:
            node = waiting.pop()
            for other in (*node.all_input_nodes, *node.users):
                if other in members and other not in found and rank(other) == rank(start):
                    found.add(other)
                    waiting.append(other)
        seen |= found
        yield Region(tuple(node for node in members if node in found), rank(start) or 0)


@dataclass(frozen=True)
class Region:
    """Connected members in graph order; every one gives tensors with `axes` axes."""

    nodes: tuple[Node, ...]
    axes: int

    @cached_property
    def members(self) -> frozenset[Node]:
        """The nodes as a set."""
        return frozenset(self.nodes)

    @cached_property
    def border(self) -> frozenset[Node]:
        """The permutes that give the region an operand, and those that take one of its results."""
        operands = {one for node in self.nodes for used in operands_of(node) for one in self._passed(used)}
        return frozenset(operands | {user for node in self.nodes for user in node.users if permutation_of(user)})

    def candidates(self) -> Iterator[Permutation]:
        """Yield the orders that cancel a permute at the border, each once."""
        found: dict[Permutation, None] = {}
        for node in self.nodes:
            for used in operands_of(node):
                permutation = permutation_of(used)
                if permutation is not None and len(permutation) == self.axes:
                    found[inverse(permutation)] = None
            for user in node.users:
                permutation = permutation_of(user)
                if permutation is not None:
                    found[permutation] = None
        for one in found:
            if not is_identity(one) and all(_allows(node, one) for node in self.nodes):
                yield one

    def _passed(self, used: Node) -> tuple[Node, ...]:
        return () if used in self.members else seen_through(used, tuple(range(rank(used) or 0)))[1]

    def permutes_with(self, order: Permutation) -> int:
        """Return how many permutes stand at the border when the region computes in `order`."""
        needed = {
            (view.base, view.permutation)
            for node in self.nodes
            for used in operands_of(node)
            if (view := self.operand(used, order)) is not None and view.is_permuted
        }
        back = inverse(order)
        for node in self.nodes:
            for user in node.users:
                if user in self.members:
                    continue
                permutation = permutation_of(user)
                if permutation is None:
                    needed.add((node, back))
                elif not self.serves_members_only(user) and not is_identity(compose(back, permutation)):
                    needed.add((node, compose(back, permutation)))
        staying = {
            one
            for one in self.border
            if one.all_input_nodes[0] not in self.members and not self.serves_members_only(one)
        }
        return len(needed) + len(staying)

    def serves_members_only(self, permute: Node) -> bool:
        """True where a permute at the border is used by the region alone."""
        return all(user in self.members for user in permute.users)

    def operand(self, used: Node, order: Permutation) -> View | None:
        """Return an operand from outside as the region wants it in `order`; None for what comes from within.

        A view whose base lies within is one of the value that the base has in `order`.
        """
        if used in self.members:
            return None
        own = rank(used) or 0
        missing = self.axes - own
        padded = (*(None for _ in range(missing)), *range(own))
        axes = tuple(padded[axis] for axis in order)
        # Broadcasting adds leading axes by itself, as many as the operand lacked before.
        leading = next((index for index, axis in enumerate(axes) if axis is not None), len(axes))
        axes = axes[min(leading, missing) :]
        if is_identity(tuple(-1 if axis is None else axis for axis in axes)):
            return View(used, axes)
        view, _ = seen_through(used, axes)
        return view.on(view.base, inverse(order)) if view.base in self.members else view.without_unit_axes()


def operands_of(node: Node) -> list[Node]:
    """Return the tensors that `node` computes on, which broadcast; not the weights of a normalization."""
    if node.target in NORMALIZATIONS:
        return node.all_input_nodes[:1]
    return [used for used in node.all_input_nodes if rank(used) is not None]


def _allows(node: Node, order: Permutation) -> bool:
    """True where `node` can be computed in `order`: what normalizes over the last axes needs them in their place."""
    if node.target not in NORMALIZATIONS:
        return True
    shape = node.args[1]
    assert isinstance(shape, (tuple, list))
    first = len(order) - len(shape)
    return order[first:] == tuple(range(first, len(order)))
