"""Small graphs for graph passes: a module's export before and after, without a program around it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from triptych.compiler.editing import GraphEditor, tidied
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method


def exported(module: nn.Module, *inputs: Tensor, dynamic_axis: int | None = None) -> ExportedProgram:
    """Export `module` as capture does; with `dynamic_axis` that axis of the first input is dynamic."""
    shapes: Any = None
    if dynamic_axis is not None:
        shapes = ({dynamic_axis: Dim("S", min=2, max=64)}, *(None for _ in inputs[1:]))
    with torch.no_grad():
        return tidied(torch.export.export(module.eval(), inputs, dynamic_shapes=shapes, strict=False))


def rewritten(program: ExportedProgram, one: GraphPass) -> tuple[ExportedProgram, MatchLog]:
    """Return `program` after a graph pass that looks at the graph alone."""
    editor, log = GraphEditor(program, one.name), MatchLog()
    one.rewrite(editor, Method(program, frozenset(), (), ()), log)
    return editor.finish(), log


def operators(program: ExportedProgram) -> Counter[str]:
    """Count the operators of a graph by name."""
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def assert_same(module: nn.Module, program: ExportedProgram, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """Hold `program` to what `module` gives for copies of the same inputs."""
    with torch.no_grad():
        wanted = module(*(one.clone() for one in inputs))
        got = program.module()(*(one.clone() for one in inputs))
    pairs: Sequence[tuple[Tensor, Tensor]] = [(got, wanted)]
    if isinstance(wanted, tuple):
        pairs = list(zip(got, wanted, strict=True))
    for mine, eager in pairs:
        torch.testing.assert_close(mine, eager, rtol=10 * tolerance, atol=tolerance, equal_nan=True)


def refusals(log: MatchLog) -> dict[str, str]:
    """Return place → reason."""
    return {one.where: one.reason for one in log.refusals}
