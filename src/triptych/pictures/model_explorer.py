"""Programs for Model Explorer, Google's viewer of large graphs: every node, in nested layers that open on a click.

The format is that of ``model_explorer.graph_builder`` (ai-edge-model-explorer 0.1.34): a collection is a label and
a list of graphs, which the viewer opens as a ``.json`` file.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.editing import bound_names
from triptych.compiler.program import Method, Program
from triptych.compiler.provenance import made_by, module_path, source_line
from triptych.compiler.text import dimension_names, tensor_text
from triptych.pictures.operators import operator_name

LABEL: Final = "triptych program"
INPUTS: Final = "inputs"
OUTPUTS: Final = "outputs"


def model_explorer_json(program: Program) -> dict[str, Any]:
    """Return `program` as a graph collection of Model Explorer: one graph a method, one node for each of its nodes.

    The namespace of a node is its stack of modules ("model/layers/0/self_attn"); weights and state stand in the
    module that holds them. Shapes and dtypes are in `outputsMetadata`; `attrs` has the operator's arguments, the
    pass that made the node and the source line of the model behind it. ``json.dumps`` writes it.
    """
    return {"label": LABEL, "graphs": [_graph(name, method, program) for name, method in program.methods.items()]}


def _graph(name: str, method: Method, program: Program) -> dict[str, Any]:
    bound, names = bound_names(method.exported), dimension_names(method)
    nodes = [_node(node, bound, names, program) for node in method.exported.graph.nodes]
    classes = {
        path.replace(".", "/"): {"class": kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"}
        for node in method.exported.graph.nodes
        for path, kind in (node.meta.get("nn_module_stack") or {}).values()
        if path
    }
    return {"id": name, "nodes": nodes, "groupNodeAttributes": classes}


def _node(node: Node, bound: Mapping[str, str], names: Mapping[str, str], program: Program) -> dict[str, Any]:
    name = bound.get(node.name) if node.op == "placeholder" else None
    if name is not None:
        label = name.rpartition(".")[2]
        namespace = name.rpartition(".")[0].replace(".", "/")
        about = [("state" if name in program.state else "weight", name)]
    elif node.op in {"placeholder", "output"}:
        label, namespace = node.name, INPUTS if node.op == "placeholder" else OUTPUTS
        about = []
    else:
        label, namespace = operator_name(node), module_path(node).replace(".", "/")
        about = [("operator", str(node.target)), *_arguments(node), ("made_by", made_by(node))]
        line = source_line(node)
        about += [("source", line)] if line else []
    return {
        "id": node.name,
        "label": label,
        "namespace": namespace,
        "attrs": [{"key": key, "value": value} for key, value in about],
        "incomingEdges": [
            {"sourceNodeId": used.name, "sourceNodeOutputId": _output_of(node, used), "targetNodeInputId": str(index)}
            for index, used in enumerate(node.all_input_nodes)
        ],
        "outputsMetadata": list(_outputs(node, names)),
    }


def _arguments(node: Node) -> Iterator[tuple[str, str]]:
    """Yield name and text of each argument; without a schema the names are numbers."""
    if isinstance(node.target, torch._ops.OpOverload):
        known = [argument.name for argument in node.target._schema.arguments]
    else:
        known = [str(index) for index in range(len(node.args))]
    for key, value in [*zip(known, node.args, strict=False), *node.kwargs.items()]:
        yield key, str(value)


def _output_of(node: Node, used: Node) -> str:
    """Return which output of `used` the node takes: a part of a tuple is taken by ``getitem``."""
    return str(node.args[1]) if node.target is operator.getitem and node.args[0] is used else "0"


def _outputs(node: Node, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    value = node.meta.get("val")
    for index, part in enumerate(value if isinstance(value, (tuple, list)) else [value]):
        if part is not None:
            text = tensor_text(part, names) if isinstance(part, Tensor) else f"{type(part).__name__} {part}"
            yield {"id": str(index), "attrs": [{"key": "tensor_shape", "value": text}]}
