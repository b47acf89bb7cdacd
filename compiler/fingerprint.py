"""Telling cheaply whether a graph changed: its structure as one number, independent of the names of its nodes."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.fx import Graph, Node


def fingerprint(exported: ExportedProgram) -> int:
    """Return a number that is equal for programs of equal graphs over the same tensors, within one process."""
    specs = exported.graph_signature
    tensors = {**exported.constants, **exported.state_dict}
    bound = [(str(spec.kind), spec.target, id(tensors.get(spec.target))) for spec in specs.input_specs]
    returned = [(str(spec.kind), spec.target) for spec in specs.output_specs]
    return hash((tuple(bound), tuple(returned), graph_key(exported.graph)))


def graph_key(graph: Graph) -> int:
    """Return a number that is equal for graphs of equal structure and arguments, within one process."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    parts = []
    for node in graph.nodes:
        target = None if node.op == "placeholder" else node.target
        parts.append((node.op, target, _frozen(node.args, order), _frozen(node.kwargs, order)))
    return hash(tuple(parts))


def _frozen(value: Any, order: dict[Node, int]) -> Any:
    if isinstance(value, Node):
        return ("node", order[value])
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item, order) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, order)) for key, item in value.items())
    return (type(value).__name__, str(value))
