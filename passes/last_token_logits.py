"""``last-token-logits``: prefill and decode return the logits of their last position only."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method
from triptych.compiler.properties import LAST_TOKEN_LOGITS, Property

aten = torch.ops.aten
SEQUENCE_AXIS: Final = 1
LAST_AXIS_REDUCTIONS: Final = (aten.mean.dim, aten.sum.dim_IntList, aten.amax.default)


@dataclass(frozen=True)
class LastTokenLogits(GraphPass):
    """Compute the vocabulary projection for one row in place of every row.

    1. In a method with role prefill or decode and an output ``logits`` [1, S, V], every operator on the way to
       the logits that treats positions alike (pointwise, linear, reductions over the last axis, quantization by
       row) and serves nothing else moves behind a slice that keeps the last position. This needs a dynamic S.
    2. The output becomes [1, V].
    """

    name: ClassVar[str] = "last-token-logits"
    ensures: ClassVar[frozenset[Property]] = frozenset({LAST_TOKEN_LOGITS})

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Slice before the projection, drop the sequence axis after it."""
        kinds = {role.kind for role in method.roles}
        if not kinds & {"prefill", "decode"} or "score" in kinds:
            return
        index = next((i for i, port in enumerate(method.outputs) if port.name == "logits"), None)
        if index is None:
            log.refused("outputs", "no output is called logits")
            return
        logits = editor.user_outputs[index]
        value = logits.meta["val"]
        if value.dim() != 3:
            log.refused("logits", f"has {value.dim()} dimensions; 3 are sliced")
            return
        length = value.shape[SEQUENCE_AXIS]
        if not log.match(logits):
            return
        # A length known at capture cannot be told from other sizes, so only a dynamic one moves operators.
        if not isinstance(length, int):
            movable = _movable(logits, length)
            sliced = [_slice(editor, node, movable) for node in _frontier(movable, length, logits)]
            editor.refresh_after(*sliced)
        with editor.graph.inserting_before(editor.graph.output_node()):
            row = editor.call(aten.select.int, editor.user_outputs[index], SEQUENCE_AXIS, -1, like=logits)
        editor.replace_user_output(index, row)


def _movable(logits: Node, length: torch.SymInt) -> set[Node]:
    """Nodes that treat positions alike and whose every use leads to the logits alone."""
    movable: set[Node] = set()
    output = logits.graph.output_node()
    values = output.args[0]
    assert isinstance(values, (tuple, list))
    for node in reversed(list(logits.graph.nodes)):
        is_the_result = node is logits and list(node.users) == [output] and list(values).count(node) == 1
        serves_logits_only = is_the_result or (bool(node.users) and all(user in movable for user in node.users))
        if serves_logits_only and _treats_positions_alike(node, length):
            movable.add(node)
    # A part moves only with the whole it is taken from; otherwise the part is what gets sliced.
    return {node for node in movable if node.target is not operator.getitem or node.args[0] in movable}


def _treats_positions_alike(node: Node, length: torch.SymInt) -> bool:
    if not _has_sequence(node, length):
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.pointwise in node.target.tags or node.target in (aten.to.dtype, aten.alias.default):
        return True
    if node.target is aten.linear.default:
        return not (isinstance(node.args[1], Node) and _has_sequence(node.args[1], length))
    if node.target in LAST_AXIS_REDUCTIONS:
        dims, keeps = node.args[1], len(node.args) > 2 and node.args[2]
        return dims in ([-1], -1) and bool(keeps)
    return node.target.namespace == "torchao" and _quantizes_rows(node)


def _quantizes_rows(node: Node) -> bool:
    """True for quantization arithmetic whose block is one row: [1, 1, D]."""
    blocks = [value for value in node.args if isinstance(value, (list, tuple))]
    return len(blocks) == 1 and list(blocks[0][:-1]) == [1, 1]


def _has_sequence(node: Node, length: torch.SymInt) -> bool:
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return isinstance(value, Tensor) and value.dim() >= 2 and str(value.shape[SEQUENCE_AXIS]) == str(length)


def _frontier(movable: set[Node], length: torch.SymInt, logits: Node) -> list[Node]:
    if not movable:
        return [logits]
    inputs = dict.fromkeys(used for node in logits.graph.nodes if node in movable for used in node.all_input_nodes)
    return [node for node in inputs if node not in movable and _has_sequence(node, length)]


def _slice(editor: GraphEditor, node: Node, movable: set[Node]) -> Node:
    with editor.graph.inserting_after(node):
        last = editor.call(aten.slice.Tensor, node, SEQUENCE_AXIS, -1, like=node)
    node.replace_all_uses_with(last, delete_user_cb=lambda user: user in movable)
    if not movable:
        editor.replace_user_output(editor.user_outputs.index(node), last)
    return last
