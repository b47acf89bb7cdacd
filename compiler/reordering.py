"""Computing a region of a graph with its axes in another order, and what may stand in the way of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node

from triptych.compiler.aliasing import Aliases, is_writer
from triptych.compiler.editing import GraphEditor
from triptych.compiler.layout import AXIS_ARGUMENTS, COPIES, Region, argument, operands_of
from triptych.compiler.matching import shown
from triptych.compiler.permutations import Permutation, View, compose, inverse, permutation_of

aten = torch.ops.aten

FIXED_LAYOUT: Final = frozenset(
    {
        aten.addmm.default,
        aten.bmm.default,
        aten.embedding.default,
        aten.layer_norm.default,
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
    }
)
"""Operators whose result lies in memory the same way whatever the strides of their operands are."""

STRIDE_SENSITIVE: Final = frozenset(
    {
        "aten::_reshape_alias",
        "aten::as_strided",
        "aten::as_strided_",
        "aten::as_strided_scatter",
        "aten::is_contiguous",
        "aten::resize_",
        "aten::set_",
        "aten::sym_storage_offset",
        "aten::sym_stride",
        "aten::unfold",
        "aten::view_as",
        "aten::view_as_complex",
    }
)
"""Operators that mean something else, or fail, where the strides of their operand are others."""


@dataclass(frozen=True)
class Memory:
    """What is written in place anywhere in the graph, and what the caller receives."""

    aliases: Aliases
    written: frozenset[Any]
    returned: frozenset[Any]

    @classmethod
    def of(cls, editor: GraphEditor) -> Memory:
        """Look at the graph of `editor` as it is now."""
        aliases = Aliases(editor)
        nodes = list(editor.graph.nodes)
        return cls(aliases, aliases.of_writes(nodes), aliases.of(*editor.user_outputs))

    def writer(self, node: Node) -> str | None:
        """Name an operator that writes in place what `node` sees, or return None."""
        roots = self.aliases.of(node)
        if not roots & self.written:
            return None
        writers = (one for one in node.graph.nodes if is_writer(one) and self.aliases.written_by(one) & roots)
        return shown(next(writers))


def obstacle(region: Region, memory: Memory) -> str | None:
    """Say why `region` may not be computed in another order; None where it may.

    1. Nothing that it computes, and nothing that it copies, may be written in place anywhere.
    2. A copy in it that goes away may not be what the caller receives.
    3. What reads strides may not depend on its results, and a ``view`` that will have to copy may not be written to.
    """
    copies = [node for node in region.nodes if node.target in COPIES]
    for node in (*region.nodes, *(used for copy in copies for used in operands_of(copy))):
        writer = memory.writer(node)
        if writer is not None:
            return f"{writer} writes in place what {shown(node)} sees"
    for copy in copies:
        if memory.aliases.of(copy) & memory.returned:
            return f"the caller receives the copy that {shown(copy)} makes"
    for node in followers(region):
        if _is_sensitive(node):
            return f"{shown(node)} depends on the strides of the result"
        if node.target is aten.view.default:
            writer = memory.writer(node)
            if writer is not None:
                return f"{writer} writes through {shown(node)}, which might have to copy"
    return None


def _is_sensitive(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return isinstance(target, torch._ops.HigherOrderOperator)
    return target._schema.name in STRIDE_SENSITIVE or target is aten.view.dtype


def followers(region: Region) -> Iterator[Node]:
    """Yield the nodes whose strides may depend on those of the region's results."""
    seen: set[Node] = set()
    waiting = [user for node in region.nodes for user in node.users]
    while waiting:
        node = waiting.pop()
        if node in seen or node in region.members:
            continue
        seen.add(node)
        yield node
        if node.target not in FIXED_LAYOUT:
            waiting += node.users


def reorder(editor: GraphEditor, region: Region, order: Permutation) -> None:
    """Compute `region` with axis order[i] in the place of axis i, and give everyone outside what they had before."""
    views = [node for node in followers(region) if node.target is aten.view.default]
    changed = _Reordering(editor, region, order).run()
    for node in views:
        # The memory may no longer allow a view; where it does, reshape gives one.
        node.target = aten.reshape.default
    editor.refresh_after(*changed)


class _Reordering:
    def __init__(self, editor: GraphEditor, region: Region, order: Permutation) -> None:
        self._editor = editor
        self._region = region
        self._order = order
        self._back = inverse(order)
        self._new: dict[Node, Node] = {}
        self._views: dict[tuple[Node, tuple[int | None, ...]], Node] = {}

    def run(self) -> list[Node]:
        """Put the new nodes beside the old ones, hand them to everyone outside, and drop what nobody uses any more."""
        border = self._region.border
        for node in self._region.nodes:
            self._new[node] = self._computed(node)
        changed: list[Node] = []
        for node in self._region.nodes:
            for user in list(node.users):
                if user not in self._region.members:
                    changed += self._hand_over(node, user)
        _erase_unused(self._editor, [*self._region.nodes, *border])
        return changed

    def _computed(self, node: Node) -> Node:
        if node.target in COPIES:
            return self._operand(node.all_input_nodes[0], node)
        operands = {used: self._operand(used, node) for used in operands_of(node)}
        mapped, named = torch.fx.map_arg((node.args, node.kwargs), lambda used: operands.get(used, used))
        args, kwargs = self._with_axes(node, list(mapped), dict(named))
        assert callable(node.target)
        with self._editor.graph.inserting_before(node):
            return self._editor.call(node.target, *args, like=node, **kwargs)

    def _with_axes(self, node: Node, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Let the arguments name the axes by their new places."""
        if node.target is aten.expand.default:
            size = argument(node, "size")
            return [args[0], [size[axis] for axis in self._order]], {}
        name = AXIS_ARGUMENTS.get(node.target)
        axes = None if name is None else argument(node, name)
        if name is None or axes is None:
            return args, kwargs
        count = self._region.axes
        is_one = isinstance(axes, int)
        places = [self._back[axis % count] for axis in ([axes] if is_one else axes)]
        assert isinstance(node.target, torch._ops.OpOverload)
        position = [one.name for one in node.target._schema.arguments].index(name)
        if position < len(args):
            args[position] = places[0] if is_one else places
        else:
            kwargs[name] = places[0] if is_one else places
        return args, kwargs

    def _operand(self, used: Node, user: Node) -> Node:
        view = self._region.operand(used, self._order)
        return self._new[used] if view is None else self._seen(view, user)

    def _seen(self, view: View, like: Node) -> Node:
        """Return the node of a view, made where its base is known, once for all who want it."""
        base = self._new.get(view.base, view.base)
        key = base, view.axes
        if key not in self._views:
            node = base
            if view.left_out:
                node = self._after(node, aten.squeeze.dims, list(view.left_out), like)
            elif view.is_permuted:
                node = self._after(node, aten.permute.default, list(view.permutation), like)
            for place, axis in enumerate(view.axes):
                if axis is None:
                    node = self._after(node, aten.unsqueeze.default, place, like)
            self._views[key] = node
        return self._views[key]

    def _after(self, node: Node, target: Any, argument_value: Any, like: Node) -> Node:
        first = self._region.nodes[0]
        for user in node.users:
            if user.target is target and user.args == (node, argument_value) and not user.kwargs and user < first:
                return user
        place = self._editor.last_placeholder if node.op == "placeholder" else node
        with self._editor.graph.inserting_after(place):
            return self._editor.call(target, node, argument_value, like=like)

    def _hand_over(self, node: Node, user: Node) -> list[Node]:
        """Give `user` from outside what it had of `node`; return the nodes it now sees."""
        permutation = permutation_of(user)
        if permutation is None:
            seen = self._seen(View(node, self._back), node)
            user.replace_input_with(node, seen)
        elif self._region.serves_members_only(user):
            return []
        else:
            seen = self._seen(View(node, compose(self._back, permutation)), user)
            user.replace_all_uses_with(seen)
        return [seen]


def _erase_unused(editor: GraphEditor, nodes: Sequence[Node]) -> None:
    """Erase those of `nodes` that nobody uses any more, and the views that served them."""
    doomed = set(nodes)
    for node in reversed(list(editor.graph.nodes)):
        if node in doomed and not node.users:
            views = [one for one in node.all_input_nodes if one.target is aten.unsqueeze.default or permutation_of(one)]
            doomed.update(views)
            editor.graph.erase_node(node)
