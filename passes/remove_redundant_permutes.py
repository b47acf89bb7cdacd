"""``remove-redundant-permutes``: permutes, views and copies that cancel go away."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.layout import CASTS, COPIES, regions
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.permutations import PERMUTES, compose, is_identity, permutation_of
from triptych.compiler.program import Method
from triptych.compiler.reordering import Memory, obstacle, reorder

aten = torch.ops.aten

RESHAPES: Final = frozenset(
    {
        aten.flatten.using_ints,
        aten.reshape.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Operators that keep the elements in their order and change the shape alone."""
IDLE: Final = frozenset(
    {
        aten.alias.default,
        aten.contiguous.default,
        aten.detach.default,
        aten.dropout.default,
        aten.expand.default,
        aten.slice.Tensor,
        *CASTS,
        *PERMUTES,
        *RESHAPES,
    }
)
"""Operators that may give their very operand."""


@dataclass(frozen=True)
class RemoveRedundantPermutes(GraphPass):
    """Take away permutes, views and copies that together do nothing.

    1. An operator that gives its very operand goes away: a cast to the dtype that is there, a view of the same
       shape, dropout in evaluation, ``contiguous`` of what is contiguous, the identity permute. So does one of these
       that nobody uses.
    2. A ``clone`` of equal strides goes away where nobody writes in place what it copies or what it makes, and the
       caller does not receive it.
    3. Views that lead back to a shape that was there give the value that had it.
    4. A permute of a permute becomes one: p then q is ``[p[i] for i in q]``, and goes away where that is the identity.
    5. A connected region that treats all axes alike or names them (pointwise operators with broadcasting, ``cat``,
       ``slice``, ``split``, reductions that keep their axes, softmax, normalizations over last axes that stay last) is
       computed in the order of axes that leaves the fewest permutes at its borders, where that is fewer than now.
       Operands get axes of size 1 elsewhere without a permute, which broadcasting needs; copies inside go away.
    6. A region stays as it is where one of its values is written in place, or something that depends on it reads
       strides. A ``view`` behind one becomes ``reshape``, since the memory may lie otherwise.
    """

    name: ClassVar[str] = "remove-redundant-permutes"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Apply the rules until none applies, and say of each permute that stays why it does."""
        sweep = _Sweep(editor, log)
        while sweep.simplify() | sweep.reorder():
            # What became dead would hold on to values that cancel now.
            editor.graph.eliminate_dead_code()
        for node in editor.calls(*PERMUTES, *COPIES):
            if node not in sweep.declined:
                log.refused(node, sweep.reasons.get(node, "nothing cancels it"))


@dataclass
class _Sweep:
    editor: GraphEditor
    log: MatchLog
    declined: set[Node] = field(default_factory=set)
    reasons: dict[Node, str] = field(default_factory=dict)

    def simplify(self) -> bool:
        """Rules 1 to 4, each operator in turn."""
        memory, changed = Memory.of(self.editor), False
        for node in self.editor.calls(*IDLE, *COPIES):
            if not node.users:
                if self._matches(node):
                    self.editor.graph.erase_node(node)
                    changed = True
                continue
            found = self._same_value(node, memory)
            if found is not None and self._matches(node):
                is_copy = memory.aliases.of(node) != memory.aliases.of(found)
                node.replace_all_uses_with(found)
                self.editor.graph.erase_node(node)
                memory, changed = (Memory.of(self.editor) if is_copy else memory), True
            elif found is None:
                changed |= self._compose(node)
        return changed

    def reorder(self) -> bool:
        """Rule 5, each region in turn."""
        memory, changed = Memory.of(self.editor), False
        for region in list(regions(self.editor)):
            border = sorted(region.border)
            order = min(region.candidates(), key=region.permutes_with, default=None) if border else None
            if order is None or region.permutes_with(order) >= len(border) or border[0] in self.declined:
                continue
            reason = obstacle(region, memory)
            if reason is not None:
                self.reasons.update(dict.fromkeys(border, reason))
            elif self._matches(border[0]):
                reorder(self.editor, region, order)
                memory, changed = Memory.of(self.editor), True
        return changed

    def _matches(self, node: Node) -> bool:
        if node in self.declined:
            return False
        if not self.log.match(node):
            self.declined.add(node)
            return False
        return True

    def _same_value(self, node: Node, memory: Memory) -> Node | None:
        """Return an earlier node that can take the place of `node`, or None."""
        (source, *_) = node.all_input_nodes
        if node.target in COPIES and memory.aliases.of(node) != memory.aliases.of(source):
            return source if _lies_alike(node, source) and self._is_free(node, source, memory) else None
        if _is_same(node, source, memory):
            return source
        if node.target not in RESHAPES:
            return None
        while source.target in RESHAPES:
            source = source.all_input_nodes[0]
            if _is_same(node, source, memory):
                return source
        return None

    def _is_free(self, copy: Node, source: Node, memory: Memory) -> bool:
        """True where a copy may go: nobody writes to either side, and the caller does not get it for its own."""
        writer = memory.writer(copy) or memory.writer(source)
        if writer is not None:
            self.reasons[copy] = f"{writer} writes in place what it copies or what it makes"
        elif memory.aliases.of(copy) & memory.returned:
            self.reasons[copy] = "the caller receives the copy"
        else:
            return True
        return False

    def _compose(self, node: Node) -> bool:
        """Rule 4 at `node`, where the permute under it serves it alone or both cancel."""
        outer = permutation_of(node)
        inner_node = node.all_input_nodes[0]
        inner = permutation_of(inner_node)
        if outer is None or inner is None:
            return False
        both, source = compose(inner, outer), inner_node.all_input_nodes[0]
        if not (is_identity(both) or len(inner_node.users) == 1) or not self._matches(node):
            return False
        with self.editor.graph.inserting_before(node):
            seen = (
                source if is_identity(both) else self.editor.call(aten.permute.default, source, list(both), like=node)
            )
        node.replace_all_uses_with(seen)
        for one in (node, inner_node):
            if not one.users:
                self.editor.graph.erase_node(one)
        return True


def _lies_alike(one: Node, other: Node) -> bool:
    """True where two tensors have one shape, one dtype and device, and equal strides."""
    first, second = one.meta.get("val"), other.meta.get("val")
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return False
    # Sizes that a run decides are equal where their expressions are.
    described = [(str(tuple(v.shape)), str(v.stride()), v.dtype, v.device) for v in (first, second)]
    return described[0] == described[1]


def _is_same(one: Node, other: Node, memory: Memory) -> bool:
    """True where `one` is `other` seen anew in the same shape, in the same memory."""
    return _lies_alike(one, other) and memory.aliases.of(one) == memory.aliases.of(other)
