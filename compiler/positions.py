"""Which values of a graph are functions of the position alone, row by row, and what they are at every position.

A method's positions are ``arange(S) + start_pos``. A value has *rows* along one axis where its row i depends on the
i-th position and on constants, never on how many positions there are or on their neighbours. Such a value can be
computed for all positions once and looked up.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.matching import shown

aten = torch.ops.aten
COPIES: Final = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.lift_fresh_copy.default,
    }
)
VIEWS: Final = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.view.default,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        operator.getitem,
    }
)
"""Operators that give a view: a lookup after one of them saves nothing over a lookup before it."""
ARANGES: Final = frozenset({aten.arange.default, aten.arange.start})
FACTORIES: Final = frozenset({*ARANGES, aten.arange.start_step, aten.full.default, aten.scalar_tensor.default})


@dataclass(frozen=True)
class Rows:
    """The value has a row for each position along `axis`."""

    axis: int


@dataclass(frozen=True)
class Constant:
    """The value is the same in every call."""


@dataclass(frozen=True)
class Length:
    """A number that follows from the sizes of the inputs."""


@dataclass(frozen=True)
class Unknown:
    """The value depends on something else; `reason` completes "it …"."""

    reason: str


Kind = Rows | Constant | Length | Unknown


class PositionFunctions:
    """Classifies the nodes of a graph whose position input is `start`; nodes added later are not known."""

    def __init__(self, editor: GraphEditor, start: Node) -> None:
        self._editor = editor
        self._start = start
        self._kinds: dict[Node, Kind] = {}
        self.positions: Node = start
        """The node with all positions, int64: ``arange(S) + start_pos``, or the start itself where S is 1."""
        for node in editor.graph.nodes:
            self._kinds[node] = self._classified(node)

    def kind(self, node: Node) -> Kind:
        """Say what `node` depends on."""
        return self._kinds[node]

    def table(self, node: Node, positions: int) -> Tensor:
        """Compute `node`, which must have rows, for the positions 0 … `positions` - 1, along the axis of its rows.

        It is the graph's own arithmetic: with a dynamic length in one go, otherwise as many positions at a time as the
        graph has. Raises `ValueError` where a size has no value.
        """
        kind = self._kinds[node]
        assert isinstance(kind, Rows)
        length = node.meta["val"].shape[kind.axis]
        if not isinstance(length, int):
            return self._run(node, 0, {length.node.expr: positions})
        parts = [self._run(node, start, {}) for start in range(0, positions, length)]
        return torch.cat(parts, dim=kind.axis).narrow(kind.axis, 0, positions)

    def _run(self, node: Node, start: int, sizes: Mapping[Any, int]) -> Tensor:
        needed = _closure(node)
        values: dict[Node, Any] = {}
        with torch.no_grad():
            for one in (one for one in self._editor.graph.nodes if one in needed):
                if isinstance(self._kinds[one], Length):
                    values[one] = _size(one.meta["val"], sizes)
                elif one is self._start:
                    values[one] = torch.full(one.meta["val"].shape, start, dtype=one.meta["val"].dtype)
                elif one.op == "placeholder":
                    values[one] = self._editor.tensor(one)
                else:
                    assert callable(one.target)
                    args, kwargs = torch.fx.map_arg((one.args, one.kwargs), lambda used: values[used])
                    values[one] = one.target(*args, **kwargs)
        result = values[node]
        assert isinstance(result, Tensor)
        return result

    # ------------------------------------------------------------------------------------------------ classification

    def _classified(self, node: Node) -> Kind:
        if node is self._start:
            return Rows(0)
        if node.op != "call_function":
            if self._editor.is_weight(node):
                return Constant()
            what = "state" if self._editor.tensor_name(node) else "input"
            return Unknown(f"depends on the {what} {self._editor.tensor_name(node) or node.name}")
        if not isinstance(_first(node.meta.get("val")), Tensor):
            return self._number(node)
        if node.target is operator.getitem:
            assert isinstance(node.args[0], Node)
            return self._kinds[node.args[0]]
        if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
            return Unknown(f"goes through {shown(node)}")
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return Unknown(f"is random: {shown(node)}")
        if node.target in (aten.sym_size.int, *FACTORIES):
            return self._factory(node)
        kinds = [self._kinds[used] for used in node.all_input_nodes]
        unknown = next((kind for kind in kinds if isinstance(kind, Unknown)), None)
        if unknown is not None:
            return self._sum_of_positions(node) or unknown
        if all(isinstance(kind, Constant) for kind in kinds):
            return self._sum_of_positions(node) or Constant()
        return self._sum_of_positions(node) or self._of_operator(node)

    def _number(self, node: Node) -> Kind:
        """Sizes of inputs and what is computed from sizes alone; everything else is data."""
        if node.target is aten.sym_size.int or all(
            isinstance(self._kinds[used], Length) for used in node.all_input_nodes
        ):
            return Length()
        return Unknown(f"goes through {shown(node)}")

    def _factory(self, node: Node) -> Kind:
        if not node.all_input_nodes:
            return Constant()
        return Unknown(f"depends on the length of the input, not on the position: {shown(node)}")

    def _sum_of_positions(self, node: Node) -> Kind | None:
        """Recognize ``arange(S) + start_pos``."""
        if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
            return None
        one, other = node.args
        for index, start in ((one, other), (other, one)):
            if start is not self._start or not isinstance(index, Node) or index.target not in ARANGES:
                continue
            if index.target is aten.arange.default or index.args[0] == 0:
                if self.positions is self._start and node.meta["val"].shape[0] != 1:
                    self.positions = node
                return Rows(0)
        return None

    def _of_operator(self, node: Node) -> Kind:
        """Follow the axis of the rows through one operator over rows and constants."""
        assert isinstance(node.target, OpOverload)
        rows = [(used, kind) for used in node.all_input_nodes if isinstance(kind := self._kinds[used], Rows)]
        has_length = any(isinstance(self._kinds[used], Length) for used in node.all_input_nodes)
        axis: int | None = None
        if _first(node.meta["val"]).is_complex():
            return Unknown(f"is complex: {shown(node)}")
        if node.target in COPIES:
            axis = rows[0][1].axis
        elif torch.Tag.pointwise in node.target.tags:
            axis = None if has_length else _pointwise_axis(node, rows)
        elif node.target is aten.cat.default and not has_length:
            axis = _cat_axis(node, rows)
        elif node.target in (aten.matmul.default, aten.bmm.default, aten.outer.default) and len(rows) == 1:
            axis = _product_axis(node, *rows[0])
        elif node.target in VIEWS and len(rows) == 1:
            axis = _view_axis(node, *rows[0])
        return Unknown(f"mixes positions in {shown(node)}") if axis is None else Rows(axis)


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) and value else value


def _closure(node: Node) -> set[Node]:
    """Return `node` and all it is computed from; sizes are leaves."""
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            if isinstance(_first(one.meta.get("val")), Tensor):
                waiting += one.all_input_nodes
    return found


def _size(value: Any, sizes: Mapping[Any, int]) -> int:
    if not isinstance(value, torch.SymInt):
        return int(value)
    found = value.node.expr.subs(sizes)
    if not found.is_number:
        raise ValueError(f"the size {found} is not known from the number of positions")
    return int(found)


# ---------------------------------------------------------------------------------------------------- axes


def _pointwise_axis(node: Node, rows: Sequence[tuple[Node, Rows]]) -> int | None:
    """All rows must lie along one axis, counted from the last, and nothing else may have a size there."""
    result = node.meta["val"]
    axes = {kind.axis - used.meta["val"].dim() for used, kind in rows}
    sizes = {str(used.meta["val"].shape[kind.axis]) for used, kind in rows}
    if len(axes) > 1 or len(sizes) > 1:
        return None
    (from_last,) = axes
    for used in node.all_input_nodes:
        value = used.meta["val"]
        is_constant = used not in dict(rows)
        if is_constant and isinstance(value, Tensor) and value.dim() >= -from_last and value.shape[from_last] != 1:
            return None
    return int(result.dim() + from_last)


def _cat_axis(node: Node, rows: Sequence[tuple[Node, Rows]]) -> int | None:
    axes = {kind.axis for _, kind in rows}
    along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(along, int)
    (axis, *others) = axes
    if others or along % node.meta["val"].dim() == axis:
        return None
    # A constant beside rows has as many rows itself only where the length is fixed, and then it is no function of them.
    return axis if len(set(node.all_input_nodes)) == len(rows) else None


def _product_axis(node: Node, used: Node, kind: Rows) -> int | None:
    """Rows of the left factor, or columns of the right one, stay apart in a product."""
    from_last = kind.axis - used.meta["val"].dim()
    if node.target is aten.outer.default:
        return 0 if node.args[0] is used else 1
    is_apart = from_last == (-2 if node.args[0] is used else -1) and node.args[0] is not node.args[1]
    dims = [one.meta["val"].dim() for one in node.args if isinstance(one, Node)]
    return int(node.meta["val"].dim() + from_last) if is_apart and min(dims) >= 2 else None


def _view_axis(node: Node, used: Node, kind: Rows) -> int | None:
    before: Tensor = used.meta["val"]
    after: Tensor = _first(node.meta["val"])
    axis = kind.axis
    numbers = [one for one in node.args[1:] if isinstance(one, int)]
    along = numbers[0] % max(1, before.dim()) if numbers else -1
    if node.target in (aten.alias.default, aten.detach.default):
        return axis
    if node.target is aten.unsqueeze.default:
        return axis + 1 if numbers[0] % (before.dim() + 1) <= axis else axis
    if node.target in (aten.squeeze.dim, aten.select.int):
        return None if along == axis else axis - (along < axis and after.dim() < before.dim())
    if node.target is aten.transpose.int:
        other = numbers[1] % before.dim()
        return other if axis == along else along if axis == other else axis
    if node.target is aten.permute.default:
        order = node.args[1]
        assert isinstance(order, (tuple, list))
        return [int(str(one)) % before.dim() for one in order].index(axis)
    if node.target is aten.expand.default:
        moved = axis + after.dim() - before.dim()
        return moved if str(after.shape[moved]) == str(before.shape[axis]) else None
    if node.target in (aten.view.default, aten.reshape.default):
        return _reshaped_axis(before.shape, after.shape, axis)
    # What is left takes slices, whose axis is an argument of its own.
    where = node.args[1] if node.target is aten.slice.Tensor else node.args[2] if len(node.args) > 2 else 0
    where = node.kwargs.get("dim", where)
    return None if not isinstance(where, int) or where % before.dim() == axis else axis


def _reshaped_axis(before: Sequence[Any], after: Sequence[Any], axis: int) -> int | None:
    """Return the axis of `after` with the same size and as many elements before it, where the others have none more."""
    size = before[axis]
    others = [one for index, one in enumerate(before) if index != axis]
    if not isinstance(size, int) and not all(isinstance(one, int) for one in others):
        return None
    for index, one in enumerate(after):
        rest = [*after[:index], *after[index + 1 :]]
        if str(one) != str(size) or not all(isinstance(value, int) for value in rest):
            continue
        if math.prod(after[:index]) == math.prod(before[:axis]) and math.prod(rest) == math.prod(others):
            return index
    return None
