"""``precompute-rope``: sines and cosines of the position become rows of constant tables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.derived_weights import DerivedWeights
from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.positions import VIEWS, PositionFunctions, Rows, Unknown
from triptych.compiler.program import Method, Program

aten = torch.ops.aten
TRIGONOMETRIC: Final = (aten.cos.default, aten.sin.default)
POSITION: Final = "position"


@dataclass(frozen=True)
class PrecomputeRoPE(ProgramPass):
    """Look rotary tables up in place of computing them in every call (Su et al., arXiv:2104.09864).

    1. In a method that takes a position (an input fed by "position"), a value counts as a function of the position
       where row i of it depends on ``start_pos + i`` and on constants alone: casts, products with frequencies,
       elementwise operators, concatenation, views.
    2. Where such a value comes from a sine or cosine, the last operator that computes it (scaling and casts included,
       views and whatever differs from layer to layer not) becomes a lookup, ``index_select``, in a constant table.
    3. The table holds the value at every position up to the context length. The graph's own operators compute it at
       compile time, so scaled, partial and interpolated variants come out as the model has them. Equal tables are
       stored once, for all layers and methods.
    4. Sines and cosines of anything else stay: of positions the caller gives (multimodal rotary embeddings), of
       frequencies that follow the length of the sequence.

    A float32 table takes 4 bytes for each position and rotary dimension.
    """

    name: ClassVar[str] = "precompute-rope"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Rewrite method by method; tables are shared by their content."""
        derived = DerivedWeights(program.state)
        changed = {}
        for name, method in program.methods.items():
            editor = GraphEditor(method.exported, self.name, derived)
            log.method, count = name, len(log.matches)
            _rewrite(editor, method, program.metadata.max_context, log)
            if len(log.matches) > count:
                changed[name] = editor.finish()
        log.method = None
        return program.with_exported(changed) if changed else program


def _rewrite(editor: GraphEditor, method: Method, max_context: int, log: MatchLog) -> None:
    names = [port.name for port in method.inputs if POSITION in port.links]
    if len(names) != 1:
        return
    functions = PositionFunctions(editor, editor.input(names[0]))
    for node in editor.calls(*TRIGONOMETRIC):
        kind = functions.kind(node)
        if isinstance(kind, Unknown):
            log.refused(node, f"it {kind.reason}")
    # All of them before the first edit: one result may be computed from another.
    tables = dict(_tables(editor, functions, max_context, log))
    lookups: dict[tuple[Node, int], Node] = {}
    for node, (axis, table) in tables.items():
        if log.match(node):
            _look_up(editor, functions, node, axis, table, lookups)


def _tables(
    editor: GraphEditor, functions: PositionFunctions, max_context: int, log: MatchLog
) -> Iterator[tuple[Node, tuple[int, Tensor]]]:
    """Yield each value to look up with the axis of its rows and its table."""
    for node in _results(editor, functions):
        kind = functions.kind(node)
        assert isinstance(kind, Rows)
        try:
            yield node, (kind.axis, functions.table(node, max_context))
        except ValueError as error:
            log.refused(node, str(error))


def _results(editor: GraphEditor, functions: PositionFunctions) -> Iterator[Node]:
    """Yield the last computed values that come from a sine or cosine of the position and serve something else."""
    from_sines: set[Node] = set()
    for node in editor.graph.nodes:
        if isinstance(functions.kind(node), Rows) and (
            node.target in TRIGONOMETRIC or any(used in from_sines for used in node.all_input_nodes)
        ):
            from_sines.add(node)
    for node in editor.graph.nodes:
        if node in from_sines and node.target not in VIEWS and _serves_others(node, from_sines):
            yield node


def _serves_others(node: Node, from_sines: set[Node]) -> bool:
    for user in node.users:
        if user not in from_sines or (user.target in VIEWS and _serves_others(user, from_sines)):
            return True
    return False


def _look_up(
    editor: GraphEditor,
    functions: PositionFunctions,
    node: Node,
    axis: int,
    table: Tensor,
    lookups: dict[tuple[Node, int], Node],
) -> None:
    label = str(node.target).split(".")[1]
    weight = editor.derive_weight(f"rotary_table_{label}", [], lambda: table, key=_digest(table))
    if (weight, axis) not in lookups:
        positions = functions.positions
        after = editor.last_placeholder if positions.op == "placeholder" else positions
        with editor.graph.inserting_after(after):
            lookups[weight, axis] = editor.call(aten.index_select.default, weight, axis, positions, like=node)
    lookup = lookups[weight, axis]
    node.replace_all_uses_with(lookup)
    editor.refresh_after(lookup)


def _digest(table: Tensor) -> object:
    data = table.contiguous().view(torch.uint8).numpy().tobytes()
    return table.dtype, tuple(table.shape), hashlib.sha256(data).hexdigest()
