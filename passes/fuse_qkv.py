"""``fuse-qkv``: the projections of one attention become one matrix product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.aliasing import Aliases, is_writer
from triptych.compiler.editing import GraphEditor
from triptych.compiler.linears import Group, fuse, linears_behind, same_value
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method

OPERANDS: Final = ("query", "key", "value")


@dataclass(frozen=True)
class FuseQKV(GraphPass):
    """Stack the query, key and value projections of an attention call along their output axis.

    1. An attention call is any operator that takes a ``query`` first, and a ``key`` and a ``value``: aten's
       ``scaled_dot_product_attention``, the neutral operators, ExecuTorch's. Where keys or values come from a cache,
       what is written into the cache counts.
    2. Each of the three must come from one linear, through reshapes, normalization, rotation and the like. Those of
       these linears that have the same input (the same node, or equal quantizations of it) become one linear with the
       rows of all, and slices of its result take their places. In cross-attention that is keys and values.
    3. Weights are float parameters or torchao's dequantized ones, scales and zero points included; all of one format.
       A linear without a bias among others with one gets zeros.
    4. Sums of linears (low-rank adapters), a linear that makes all three already, and weights that anything else in
       the method uses (they would be stored twice) are left alone.

    Every output is the same sum of the same products as before. Methods that share the weights share the stack. A
    method in which the projections cannot be stacked keeps its own, and the program then stores both forms.
    """

    name: ClassVar[str] = "fuse-qkv"

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Look at every attention call, then stack what can be."""
        writers = _cache_writers(editor)
        groups: dict[tuple[Node, ...], Group] = {}
        for node in editor.graph.nodes:
            if not _is_attention(node):
                continue
            found = _projections(node, writers)
            if isinstance(found, str):
                log.refused(node, found)
            else:
                groups.setdefault(found, Group(node, found))
        fuse(editor, list(groups.values()), "qkv", log)


def _is_attention(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    return names[:1] == ["query"] and set(OPERANDS) <= set(names)


def _cache_writers(editor: GraphEditor) -> Mapping[Node, list[Node]]:
    """Return placeholder → the nodes that write into it."""
    aliases = Aliases(editor)
    written = {node: aliases.written_by(node) for node in editor.graph.nodes if is_writer(node)}
    return {
        place: [node for node, roots in written.items() if roots & aliases.of(place)]
        for place in editor.graph.find_nodes(op="placeholder")
    }


def _projections(attention: Node, writers: Mapping[Node, list[Node]]) -> tuple[Node, ...] | str:
    """Return the linears to stack, in the order query, key, value, or why there are none."""
    linears: dict[Node, None] = {}
    earlier = {place: [node for node in found if node < attention] for place, found in writers.items()}
    for name, operand in zip(OPERANDS, _operands(attention), strict=True):
        found = linears_behind(operand, lambda node: not _is_attention(node), earlier)
        if len(found) > 1:
            return f"its {name} combines the results of {len(found)} linears, {found[0].name} and {found[1].name} first"
        linears.update(dict.fromkeys(found))
    if len(linears) < 2:
        return "its query, key and value come from one linear already" if linears else "no linear feeds it"
    alike = [tuple(other for other in linears if same_value(one.args[0], other.args[0])) for one in linears]
    largest = max(alike, key=len)
    return largest if len(largest) > 1 else "its projections have different inputs"


def _operands(attention: Node) -> list[Node]:
    assert isinstance(attention.target, OpOverload)
    names = [argument.name for argument in attention.target._schema.arguments]
    given = dict(zip(names, attention.args, strict=False)) | dict(attention.kwargs)
    operands = [given[name] for name in OPERANDS]
    return [operand for operand in operands if isinstance(operand, Node)]
