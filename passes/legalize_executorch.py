"""``legalize-executorch``: neutral operators become ExecuTorch's ``llama::`` kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method
from triptych.compiler.targets.custom_ops import register_llama_operators


@dataclass(frozen=True)
class LegalizeExecuTorch(GraphPass):
    """Speak ExecuTorch's custom operators (schemas in ``extension/llm/custom_ops``).

    1. ``triptych::update_cache(cache, value, start_pos)`` → ``llama::update_cache(value, cache, start)``
    2. ``triptych::cached_sdpa(q, k, v, start_pos, scale)`` →
       ``llama::custom_sdpa(q, k, v, start, None, 0.0, is_causal=True, scale)``
    3. ``start`` is the one element of ``start_pos``, read once a method and bounded by the cache's length.
    4. ``aten.embedding`` loses its padding index, which only gradients see: ExecuTorch recognizes a quantized
       embedding by its bare form.
    """

    name: ClassVar[str] = "legalize-executorch"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Replace every neutral operator call."""
        register_llama_operators()
        updates = list(editor.calls(torch.ops.triptych.update_cache.default))
        attentions = list(editor.calls(torch.ops.triptych.cached_sdpa.default))
        starts: dict[Node, Node] = {}

        def start_of(start_pos: Node, rows: Node) -> Node:
            if start_pos not in starts:
                starts[start_pos] = _read_start(editor, start_pos, rows.meta["val"].shape[1])
            return starts[start_pos]

        for node in filter(log.match, updates):
            cache, value, start_pos = node.args
            assert isinstance(cache, Node)
            assert isinstance(start_pos, Node)
            start = start_of(start_pos, cache)
            with editor.graph.inserting_before(node):
                editor.call(torch.ops.llama.update_cache.default, value, cache, start, like=node)
            editor.graph.erase_node(node)
        for node in filter(log.match, attentions):
            query, keys, values, start_pos, *scale = node.args
            assert isinstance(keys, Node)
            assert isinstance(start_pos, Node)
            start = start_of(start_pos, keys)
            with editor.graph.inserting_before(node):
                attended = editor.call(
                    torch.ops.llama.custom_sdpa.default, query, keys, values, start, None, 0.0, True, *scale, like=node
                )
            node.replace_all_uses_with(attended)
            editor.graph.erase_node(node)
        for node in editor.calls(torch.ops.aten.embedding.default):
            if len(node.args) > 2 and log.match(node):
                node.args = node.args[:2]


def _read_start(editor: GraphEditor, start_pos: Node, slots: int) -> Node:
    after = editor.last_placeholder if start_pos.op == "placeholder" else start_pos
    with editor.graph.inserting_after(after):
        element = editor.call(torch.ops.aten.select.int, start_pos, 0, 0)
    with editor.graph.inserting_after(element):
        start = editor.call(torch.ops.aten.item.default, element)
    with editor.graph.inserting_after(start):
        editor.call(torch.ops.aten.sym_constrain_range_for_size.default, start, min=0, max=slots - 1)
    return start
