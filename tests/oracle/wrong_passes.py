"""Passes with one bug each, of the kinds that rewrites of language models really have.

Each rewrites many places, all of them rightly but one, which its options name; so there is something to find for a
search. A pass whose options name no place at all is right.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.editing import GraphEditor, bound_names, rebuild, storage_identity
from triptych.compiler.pass_kinds import GraphPass, MatchLog, ProgramPass
from triptych.compiler.program import Method, Program
from triptych.compiler.provenance import layer_of
from triptych.modules import operators as _neutral_operators  # noqa: F401 (registers the operators named here)

aten = torch.ops.aten
cached_sdpa = torch.ops.triptych.cached_sdpa.default
update_cache = torch.ops.triptych.update_cache.default
TIED = ("lm_head.weight", "model.language_model.embed_tokens.weight")


@dataclass(frozen=True)
class WrongOnce(GraphPass):
    """Rewrites all `candidates`; wrongly where they stand at `index` of `layer` in the method with `role`."""

    role: str = ""
    layer: str | None = None
    index: int = 0

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        places = list(self.candidates(editor))
        here = [node for node in places if layer_of(node) == self.layer] if self.role in map(str, method.roles) else []
        for node in places:
            if log.match(node):
                if node in here[self.index : self.index + 1]:
                    self.wrong(editor, node)
                else:
                    self.right(editor, node)

    @abstractmethod
    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        """Yield the places."""

    @abstractmethod
    def right(self, editor: GraphEditor, node: Node) -> None:
        """Rewrite `node` to something that computes the same."""

    @abstractmethod
    def wrong(self, editor: GraphEditor, node: Node) -> None:
        """Rewrite `node` as the bug has it."""


def input_of(node: Node, index: int = 0) -> Node:
    """Return the node that is argument `index` of `node`."""
    value = node.args[index]
    assert isinstance(value, Node)
    return value


def replace(node: Node, by: Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


class ComposePermutes(WrongOnce):
    """Two transposes in a row become one permutation. The bug: it forgets the first of them."""

    name: ClassVar[str] = "compose-permutes"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        for node in editor.calls(aten.transpose.int):
            if input_of(node).target is aten.transpose.int:
                yield node

    def right(self, editor: GraphEditor, node: Node) -> None:
        first = order_of(input_of(node))
        self._permute(editor, node, [first[axis] for axis in order_of(node)])

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self._permute(editor, node, order_of(node))

    def _permute(self, editor: GraphEditor, node: Node, order: list[int]) -> None:
        with editor.graph.inserting_before(node):
            replace(node, editor.call(aten.permute.default, input_of(input_of(node)), order, like=node))


def order_of(transpose: Node) -> list[int]:
    """Return the permutation that a transpose is."""
    order = list(range(transpose.meta["val"].dim()))
    _, one, other = transpose.args
    assert isinstance(one, int)
    assert isinstance(other, int)
    order[one], order[other] = order[other], order[one]
    return order


class MaskAsAddend(WrongOnce):
    """Boolean attention masks become numbers to add. The bug: the forbidden places get 0, so nothing is masked."""

    name: ClassVar[str] = "mask-as-addend"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        for node in editor.calls(aten.scaled_dot_product_attention.default):
            if len(node.args) > 3 and isinstance(node.args[3], Node):
                yield node

    def right(self, editor: GraphEditor, node: Node) -> None:
        self._mask(editor, node, float("-inf"))

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self._mask(editor, node, 0.0)

    def _mask(self, editor: GraphEditor, node: Node, forbidden: float) -> None:
        with editor.graph.inserting_before(node):
            addend = editor.call(aten.where.Scalar, input_of(node, 3), 0.0, forbidden, like=node)
        node.update_arg(3, addend)


class CountSlots(WrongOnce):
    """The slot that a cache is written at is computed anew. The bug: it counts from one."""

    name: ClassVar[str] = "count-slots"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        yield from editor.calls(update_cache)

    def right(self, editor: GraphEditor, node: Node) -> None:
        self._write_at(editor, node, 0)

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self._write_at(editor, node, 1)

    def _write_at(self, editor: GraphEditor, node: Node, offset: int) -> None:
        with editor.graph.inserting_before(node):
            node.update_arg(2, editor.call(aten.add.Tensor, input_of(node, 2), offset, like=node))


class ReadThroughAlias(WrongOnce):
    """Attention reads its cached keys by another name. The bug: it is the name of a copy, made before the write."""

    name: ClassVar[str] = "read-through-alias"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        yield from editor.calls(cached_sdpa)

    def right(self, editor: GraphEditor, node: Node) -> None:
        self._read(editor, node, aten.alias.default)

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self._read(editor, node, aten.clone.default)

    def _read(self, editor: GraphEditor, node: Node, through: OpOverload) -> None:
        with editor.graph.inserting_after(editor.last_placeholder):
            node.update_arg(1, editor.call(through, input_of(node, 1), like=node))


class ScaleQueries(WrongOnce):
    """Queries are scaled before attention and not inside it. The bug: keys and values change places."""

    name: ClassVar[str] = "scale-queries"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        yield from editor.calls(cached_sdpa)

    def right(self, editor: GraphEditor, node: Node) -> None:
        query, keys, values, start_pos, scale = node.args
        with editor.graph.inserting_before(node):
            scaled = editor.call(aten.mul.Tensor, query, scale, like=node)
        node.args = (scaled, keys, values, start_pos, 1.0)

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self.right(editor, node)
        query, keys, values, *rest = node.args
        node.args = (query, values, keys, *rest)


class SpellOutNorm(WrongOnce):
    """``rsqrt(mean + eps)`` becomes ``1 / sqrt(mean + eps)``. The bug: the epsilon is lost."""

    name: ClassVar[str] = "spell-out-norm"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        for node in editor.calls(aten.rsqrt.default):
            if input_of(node).target is aten.add.Tensor:
                yield node

    def right(self, editor: GraphEditor, node: Node) -> None:
        self._root(editor, node, input_of(node))

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self._root(editor, node, input_of(input_of(node)))

    def _root(self, editor: GraphEditor, node: Node, value: Node) -> None:
        with editor.graph.inserting_before(node):
            root = editor.call(aten.sqrt.default, value, like=node)
            replace(node, editor.call(aten.reciprocal.default, root, like=node))


class RoundTrip(WrongOnce):
    """Results of linear layers go through another dtype and back. The bug: it is a narrower one."""

    name: ClassVar[str] = "round-trip"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        yield from editor.calls(aten.linear.default)

    def right(self, editor: GraphEditor, node: Node) -> None:
        self._cast(editor, node, torch.float64)

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self._cast(editor, node, torch.bfloat16)

    def _cast(self, editor: GraphEditor, node: Node, dtype: torch.dtype) -> None:
        with editor.graph.inserting_after(node):
            there = editor.call(aten.to.dtype, node, dtype, like=node)
        with editor.graph.inserting_after(there):
            back = editor.call(aten.to.dtype, there, torch.float32, like=node)
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not there)


class UntieWeights(WrongOnce):
    """Every use of the tied embedding gets a weight of its own. The bug: one of them has other values."""

    name: ClassVar[str] = "untie-weights"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        for node in editor.calls(aten.embedding.default, aten.linear.default):
            if editor.tensor_name(self._weight(node)) in TIED:
                yield node

    def right(self, editor: GraphEditor, node: Node) -> None:
        self._untie(editor, node, 1.0)

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        self._untie(editor, node, 1.01)

    def _untie(self, editor: GraphEditor, node: Node, factor: float) -> None:
        weight = self._weight(node)
        own = editor.add_weight(f"{node.name}.weight", editor.tensor(weight).detach() * factor)
        node.replace_input_with(weight, own)

    def _weight(self, node: Node) -> Node:
        return input_of(node, 0 if node.target is aten.embedding.default else 1)


class WriteLater(WrongOnce):
    """The write of the fresh keys moves down in the graph. The bug: it moves below the attention that reads them."""

    name: ClassVar[str] = "write-later"

    def candidates(self, editor: GraphEditor) -> Iterator[Node]:
        yield from editor.calls(cached_sdpa)

    def right(self, editor: GraphEditor, node: Node) -> None:
        node.prepend(self._write_of(node))

    def wrong(self, editor: GraphEditor, node: Node) -> None:
        node.append(self._write_of(node))

    def _write_of(self, node: Node) -> Node:
        return next(user for user in input_of(node, 1).users if user.target is update_cache)


class PrefillOnly(GraphPass):
    """``silu(x)`` becomes ``x sigmoid(x)``. The bug: only where the length is dynamic, so never in decode."""

    name: ClassVar[str] = "prefill-only"
    uniform: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        for node in editor.calls(aten.silu.default):
            if isinstance(node.meta["val"].shape[1], int):
                log.refused(node, "has a length known at capture")
            elif log.match(node):
                with editor.graph.inserting_before(node):
                    gate = editor.call(aten.sigmoid.default, input_of(node), like=node)
                    replace(node, editor.call(aten.mul.Tensor, input_of(node), gate, like=node))


class SplitState(ProgramPass):
    """Gives decode cache rows of its own, of equal values. The bug: decode no longer sees what prefill wrote."""

    name: ClassVar[str] = "split-state"

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        if not log.match("decode"):
            return program
        exported = program.methods["decode"].exported
        rows = {storage_identity(row.initial) for row in program.state.values()}
        state = {
            name: tensor.clone() if storage_identity(tensor) in rows else tensor
            for name, tensor in exported.state_dict.items()
        }
        assert set(program.state) <= set(bound_names(exported).values())
        return program.with_exported({"decode": rebuild(exported, exported.graph_module, state_dict=state)})
