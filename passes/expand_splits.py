"""``expand-splits``: a split into parts of fixed size becomes slices."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method

aten = torch.ops.aten


@dataclass(frozen=True)
class ExpandSplits(GraphPass):
    """Write the parts of ``split``, ``split_with_sizes`` and ``chunk`` as slices, for back ends that take no splits.

    1. Each part that is used becomes ``x[..., start:stop]`` along the axis of the split.
    2. A split along an axis of dynamic size stays.
    """

    name: ClassVar[str] = "expand-splits"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Replace every split along an axis of fixed size."""
        splits = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
        for node in editor.calls(*splits):
            arguments: tuple[Any, ...] = (*node.args, *node.kwargs.values(), 0)
            x, _, axis = arguments[:3]
            sizes = [part.shape[axis] for part in node.meta["val"]]
            if not all(isinstance(size, int) for size in sizes):
                log.refused(node, f"axis {axis} has a dynamic size")
            elif log.match(node):
                for user in list(node.users):
                    _take(editor, node, user, x, axis, sizes)
                editor.graph.erase_node(node)


def _take(editor: GraphEditor, split: Node, part: Node, x: Node, axis: int, sizes: list[int]) -> None:
    assert part.target is operator.getitem, "a split is taken apart by getitem"
    index = int(str(part.args[1]))
    start = sum(sizes[:index])
    with editor.graph.inserting_before(split):
        taken = editor.call(aten.slice.Tensor, x, axis, start, start + sizes[index], like=split)
    part.replace_all_uses_with(taken)
    editor.graph.erase_node(part)
