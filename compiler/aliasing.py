"""Which nodes of a graph may share memory, and which of them write into it.

The graph of a capture keeps in-place operators and views, so moving or replacing a node is only right where nobody
writes what it reads in between. Memory is known by its *roots*: the placeholder (by storage, so that tied weights
are one) or the node that allocated it.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

from triptych.compiler.editing import GraphEditor, Traced, storage_identity
from triptych.compiler.matching import shown

Root = Node | int
"""The node that allocates the memory, or the identity of a parameter's or buffer's storage."""

Roots = frozenset[Root]


def is_writer(node: Node) -> bool:
    """True where `node` may write into one of its operands; operators over nested graphs count as such."""
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, HigherOrderOperator)


class Aliases:
    """The roots of values in the graph of `editor` as it is now; make another one after an edit.

    `given` holds the roots of nodes that are known already: the placeholders of a traced replacement.
    """

    def __init__(self, editor: GraphEditor, given: Mapping[Node, Roots] | None = None) -> None:
        self._editor = editor
        self._roots: dict[Node, Roots] = dict(given or {})

    def of(self, *values: Any) -> Roots:
        """Return the roots of everything in `values`: nodes, lists of them, literals."""
        found: Roots = frozenset()
        for value in values:
            if isinstance(value, Node):
                if value not in self._roots:
                    self._roots[value] = self._roots_of(value)
                found |= self._roots[value]
            elif isinstance(value, (tuple, list)):
                found |= self.of(*value)
        return found

    def written_by(self, node: Node) -> Roots:
        """Return the roots of what `node` writes in place."""
        if isinstance(node.target, OpOverload):
            return self.of(*_marked(node, node.target, writes=True))
        return self.of(*node.all_input_nodes) if is_writer(node) else frozenset()

    def of_writes(self, nodes: Iterable[Node]) -> Roots:
        """Return the roots of what any of `nodes` writes in place."""
        return frozenset().union(*(self.written_by(node) for node in nodes if is_writer(node)))

    def conflict(self, one: Node, other: Node) -> bool:
        """True where one of two nodes writes in place what the other uses, so that their order matters."""
        return any(
            self.written_by(first) & self.of(second, *second.all_input_nodes)
            for first, second in ((one, other), (other, one))
        )

    def _roots_of(self, node: Node) -> Roots:
        if not _has_tensor(node.meta.get("val")):
            return frozenset()
        if node.op != "call_function":
            is_state = self._editor.tensor_name(node) is not None
            return frozenset({storage_identity(self._editor.tensor(node)) if is_state else node})
        if node.target is operator.getitem:
            return self.of(node.args[0])
        if not isinstance(node.target, OpOverload):
            return frozenset({node}) | self.of(*node.all_input_nodes)
        if node.target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            return self._roots_of_composite(node)
        if any(result.alias_info is not None for result in node.target._schema.returns):
            return self.of(*_marked(node, node.target, writes=False))
        return frozenset({node})

    def _roots_of_composite(self, node: Node) -> Roots:
        """Find out by running: the schema of a composite operator says less than it does.

        ``reshape`` and ``contiguous`` may copy, and ``dropout`` may return its very input.
        """
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        environment = self._editor.fake_mode.shape_env
        assert callable(node.target)
        try:
            with torch.no_grad(), self._editor.fake_mode:
                if environment is None:
                    result = node.target(*args, **kwargs)
                else:
                    with environment.ignore_fresh_unbacked_symbols(), environment.error_on_new_guards():
                        result = node.target(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError):
            return frozenset({node}) | self.of(*node.all_input_nodes)
        storages = _storages(result)
        shared = [used for used in node.all_input_nodes if storages & _storages(used.meta["val"])]
        fresh = storages - _storages([used.meta["val"] for used in node.all_input_nodes])
        return self.of(*shared) | (frozenset({node}) if fresh or not storages else frozenset())


def _marked(node: Node, target: OpOverload, *, writes: bool) -> list[Any]:
    """Return the operands that the schema marks as shared with a result, or as written."""
    found = []
    for position, argument in enumerate(target._schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if argument.alias_info is not None and (argument.alias_info.is_write or not writes):
            found.append(value)
    return found


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(map(_has_tensor, value)))


def _storages(value: Any) -> frozenset[int]:
    if isinstance(value, Tensor):
        return frozenset({storage_identity(value)})
    if isinstance(value, (tuple, list)):
        return frozenset().union(*map(_storages, value))
    return frozenset()


# ---------------------------------------------------------------------------------------------------- rewrites


@dataclass(frozen=True)
class Region:
    """A part of a graph that is to be replaced: its nodes in graph order, the nodes it reads, its results."""

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]


def out_of_order(region: Region, wanted: Sequence[Node], writers: Sequence[Node], aliases: Aliases) -> str | None:
    """Say which write keeps the nodes of `region` from being carried out together; None where none does.

    1. No other node among them may write what they read, or touch what they write.
    2. Those that touch memory which one of them writes stand in the order `wanted`.

    `writers` are the nodes of the graph that write in place.
    """
    first, last = region.nodes[0], region.nodes[-1]
    for writer in writers:
        if first < writer < last and writer not in region.nodes:
            touched = aliases.of(*region.nodes, *region.inputs)
            if aliases.written_by(writer) & touched:
                return f"between its nodes {shown(writer)} writes in place what the match reads"
    written = aliases.of_writes(region.nodes)
    if not written:
        return None
    for node in first.graph.nodes:
        if first < node < last and node not in region.nodes and aliases.of(*node.all_input_nodes) & written:
            return f"between its nodes {shown(node)} uses what the match writes in place"
    for one, other in itertools.combinations(wanted, 2):
        if other < one and aliases.conflict(one, other):
            return f"{shown(other)} precedes {shown(one)}, not so in the pattern, and one writes what the other uses"
    return None


def seen_differently(
    region: Region,
    leaving: frozenset[Node],
    place: Node,
    traced: Traced,
    writers: Sequence[Node],
    aliases: Aliases,
    editor: GraphEditor,
) -> str | None:
    """Say which write the rest of the graph would see differently with `traced` before `place`; None where none.

    `leaving` are the nodes of `region` that go; `traced.results` is a tuple with one entry for each of its outputs.

    1. What only the region or only the replacement writes in place must have no reader left.
    2. Where a result shares memory that it did not share, or no longer does, nobody may write it later.
    """
    later = [node for node in writers if place < node and node not in region.nodes]
    inside = [node for node in traced.graph.nodes if is_writer(node)]
    if not later and not inside and not any(map(is_writer, region.nodes)):
        return None
    placeholders = [node for node in traced.graph.nodes if node.op == "placeholder"]
    roots = {inner: aliases.of(outer) for inner, outer in zip(placeholders, traced.inputs, strict=True)}
    traced_aliases = Aliases(editor, roots)
    traced_own = frozenset(traced.graph.nodes)
    before, after = aliases.of_writes(region.nodes) - leaving, traced_aliases.of_writes(inside) - traced_own
    for root in before ^ after:
        reader = _reader(root, region, aliases)
        if reader is not None:
            one, other = ("match", "replacement") if root in before else ("replacement", "match")
            return f"the {one} writes in place what {reader} sees, and the {other} does not"
    old = [aliases.of(node) for node in region.outputs]
    new = [traced_aliases.of(result) for result in traced.results]
    if _sharing(old, leaving) != _sharing(new, traced_own):
        shared = frozenset().union(*old, *new)
        for writer in later:
            if aliases.written_by(writer) & shared:
                return f"its result would share other memory than now, and {shown(writer)} writes there later"
    return None


def _reader(root: Root, region: Region, aliases: Aliases) -> str | None:
    """Name who sees the memory of `root` once `region` has begun, by another way than the region's results."""
    if isinstance(root, int):
        return "the next call"
    if root.op == "placeholder":
        return "the caller"
    for node in root.graph.nodes:
        if region.nodes[0] < node and node not in region.nodes:
            for used in node.all_input_nodes:
                if used < region.nodes[-1] and used not in region.outputs and root in aliases.of(used):
                    return shown(node)
    return None


def _sharing(results: Sequence[Roots], own: frozenset[Node]) -> list[object]:
    """Return for each result: the memory from outside of `own` that it shares, whether any is fresh, its partners."""
    return [
        (one - own, bool(one & own), frozenset(index for index, other in enumerate(results) if one & other))
        for one in results
    ]
