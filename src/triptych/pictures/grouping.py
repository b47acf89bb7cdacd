"""Which nodes of a method share a box, and which layers share a frame.

Outside of layers a box holds the operators of the outermost module that contains no stack of layers. What a
module that contains one computes itself, before, between and after the modules in it, is in boxes of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch.fx import Node

from triptych.compiler.program import Program
from triptych.compiler.provenance import layer_of, module_path
from triptych.pictures.layers import Run, layer_runs
from triptych.pictures.operators import is_drawn

TOP: Final = "entry point"


@dataclass(frozen=True)
class Grouping:
    """The nodes of a method by what they are drawn in.

    `ends` gives the key of the box or frame of each node, inputs of the method too. `boxes` and `runs` are what
    lies behind the keys, in order; `titles` names every key, `paths` the module of each box.
    """

    ends: Mapping[Node, str]
    boxes: Mapping[str, Sequence[Node]]
    runs: Mapping[str, Run]
    titles: Mapping[str, str]
    paths: Mapping[str, str]


def group_nodes(program: Program, name: str) -> Grouping:
    """Group the nodes of the method called `name`."""
    method = program.methods[name]
    graph = method.exported.graph
    inputs = {port.name for port in method.inputs}
    ends = {node: f"input {node.name}" for node in graph.nodes if node.op == "placeholder" and node.name in inputs}
    titles = {key: node.name for node, key in ends.items()}
    nodes = [node for node in graph.nodes if is_drawn(node)]
    around = _modules_around_stacks(program)
    modules = {node: _outermost(module_path(node), around) for node in nodes if layer_of(node) is None}
    runs = {f"run {index}": run for index, run in enumerate(layer_runs(method, modules))}
    in_runs = {node: key for key, run in runs.items() for layer in run.layers for node in layer.nodes}
    titles.update({key: run.path for key, run in runs.items()})
    boxes: dict[str, list[Node]] = {}
    paths: dict[str, str] = {}
    # Between the layers of one run, which are drawn once, boxes are counted anew after each layer, so that what
    # repeats there is drawn once too.
    after, module, count = "", None, 0
    for node in nodes:
        if node in in_runs:
            ends[node] = after = in_runs[node]
            module, count = None, 0
            continue
        if modules[node] != module:
            module, count = modules[node], count + 1
        key = ends[node] = f"box {after} {count} {module}"
        boxes.setdefault(key, []).append(node)
        paths[key] = module
        titles[key] = module or TOP
    return Grouping(ends, boxes, runs, titles, paths)


def _modules_around_stacks(program: Program) -> frozenset[str]:
    """Return the paths of all modules that contain layers, the top included."""
    layers = {
        layer
        for method in program.methods.values()
        for node in method.exported.graph.nodes
        if (layer := layer_of(node))
    }
    return frozenset({"", *(prefix for layer in layers for prefix in _prefixes(layer.rpartition(".")[0]))})


def _outermost(path: str, around: frozenset[str]) -> str:
    return next((prefix for prefix in _prefixes(path) if prefix not in around), path)


def _prefixes(path: str) -> Iterator[str]:
    """Yield "a", "a.b", "a.b.c" for "a.b.c"."""
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])
