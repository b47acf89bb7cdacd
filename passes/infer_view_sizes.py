"""``infer-view-sizes``: a reshape to one dynamic size leaves that size to be inferred."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method

aten = torch.ops.aten


@dataclass(frozen=True)
class InferViewSizes(GraphPass):
    """Write ``view(x, [1, S, 9, 64])`` as ``view(x, [1, -1, 9, 64])``.

    1. XNNPACK's partitioner takes a view with one inferred size, and refuses one that is given a symbol.
    2. `reshape`, `flatten` and `unflatten` become such a view where memory order allows it, else a view of a copy.
    3. A view to several dynamic sizes stays.
    """

    name: ClassVar[str] = "infer-view-sizes"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Rewrite every reshape to one dynamic size."""
        views = (aten.view.default, aten._unsafe_view.default)  # noqa: SLF001 (an operator's name)
        copies = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
        for node in editor.calls(*views, *copies):
            x, value = node.args[0], node.meta["val"]
            assert isinstance(x, Node)
            sizes = [one if isinstance(one, int) else -1 for one in value.shape]
            if -1 not in sizes or (node.target in views and sizes in node.args):
                continue
            if sizes.count(-1) > 1:
                log.refused(node, f"it is to {sizes.count(-1)} dynamic sizes; one can be inferred")
            elif log.match(node):
                with editor.graph.inserting_before(node):
                    if node.target in copies and not _can_be_viewed(x.meta["val"]):
                        x = editor.call(aten.clone.default, x, memory_format=torch.contiguous_format, like=node)
                    view = editor.call(aten.view.default, x, sizes, like=node)
                node.replace_all_uses_with(view)
                editor.graph.erase_node(node)


def _can_be_viewed(value: Tensor) -> bool:
    return value.is_contiguous()
