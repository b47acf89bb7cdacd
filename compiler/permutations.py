"""Permutations of axes: what operators like ``transpose`` do, and what becomes of a value seen in another order.

A permutation is a tuple p as ``permute`` takes it: axis i of the result is axis p[i] of the input. Two permutes in a
row cancel where their composition is the identity, which equal axes do not make it: (1, 2, 0) twice is (2, 0, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
PERMUTES: Final = frozenset(
    {
        aten.adjoint.default,
        aten.mT.default,
        aten.moveaxis.int,
        aten.moveaxis.intlist,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.numpy_T.default,
        aten.permute.default,
        aten.swapaxes.default,
        aten.swapdims.default,
        aten.t.default,
        aten.transpose.int,
    }
)
Permutation = tuple[int, ...]


def compose(first: Permutation, second: Permutation) -> Permutation:
    """Return the one permutation that does what `first` and then `second` do."""
    return tuple(first[axis] for axis in second)


def inverse(permutation: Permutation) -> Permutation:
    """Return the permutation that undoes `permutation`."""
    return tuple(permutation.index(axis) for axis in range(len(permutation)))


def is_identity(permutation: Permutation) -> bool:
    """True where `permutation` leaves every axis in its place."""
    return permutation == tuple(range(len(permutation)))


def rank(node: Node) -> int | None:
    """Return the number of axes of the tensor that `node` gives, or of the first of its tensors; None without one."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value.dim() if isinstance(value, Tensor) else None


def permutation_of(node: Any) -> Permutation | None:
    """Return the permutation that the call `node` carries out, or None where it is no permute of a tensor.

    It is read off a trial on a tensor without data whose axes are told apart by their strides.
    """
    if not isinstance(node, Node) or node.op != "call_function" or node.target not in PERMUTES:
        return None
    axes = rank(node)
    assert axes is not None
    assert callable(node.target)
    trial = torch.empty([2] * axes, device="meta")
    strides = node.target(trial, *node.args[1:], **node.kwargs).stride()
    return tuple(trial.stride().index(stride) for stride in strides)


@dataclass(frozen=True)
class View:
    """A value as another one seen anew: axis i is axis `axes[i]` of `base`, or a new axis of size 1 where that is None.

    Every axis of `base` appears once, but for axes of size 1, which may be left out.
    """

    base: Node
    axes: tuple[int | None, ...]

    @property
    def permutation(self) -> Permutation:
        """The order of the axes of `base`, without the new ones."""
        return tuple(axis for axis in self.axes if axis is not None)

    @property
    def left_out(self) -> tuple[int, ...]:
        """The axes of `base` that do not appear."""
        return tuple(axis for axis in range(rank(self.base) or 0) if axis not in self.axes)

    @property
    def is_permuted(self) -> bool:
        """True where `base` has to be permuted, and adding axes will not do."""
        return self.permutation != tuple(sorted(self.permutation))

    def on(self, base: Node, permutation: Permutation) -> View:
        """Return this view in terms of another `base`, of which the present one is a permute."""
        return View(base, tuple(None if axis is None else permutation[axis] for axis in self.axes))

    def without_unit_axes(self) -> View:
        """Return the same view with axes of size 1 left out and added, where that spares the permute."""
        shape = self.base.meta["val"].shape
        units = [axis for axis, size in enumerate(shape) if isinstance(size, int) and size == 1]
        other = View(self.base, tuple(None if axis in units else axis for axis in self.axes))
        return other if self.is_permuted and not other.is_permuted else self


def seen_through(node: Node, axes: tuple[int | None, ...]) -> tuple[View, tuple[Node, ...]]:
    """Look through permutes and ``unsqueeze``: return `node` with `axes` in terms of their source, and the permutes."""
    view, passed = View(node, axes), []
    while True:
        base = view.base
        permutation = permutation_of(base)
        if permutation is not None:
            passed.append(base)
            view = view.on(base.all_input_nodes[0], permutation)
        elif base.target is aten.unsqueeze.default and isinstance(base.args[1], int):
            added = base.args[1] % (rank(base) or 1)
            kept = [axis for axis in range(rank(base) or 1) if axis != added]
            order = {axis: index for index, axis in enumerate(kept)}
            view = View(base.all_input_nodes[0], tuple(None if a is None else order.get(a) for a in view.axes))
        else:
            return view, tuple(passed)
