"""A method as a diagram: one box for the operators of a module, and equal layers of a stack drawn once.

Arithmetic on sizes is left out, and so are weights and state, which boxes count and name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from torch.export.graph_signature import OutputKind
from torch.fx import Node

from triptych.compiler.program import Method, Program
from triptych.compiler.provenance import module_path
from triptych.errors import UsageError
from triptych.manifest import TensorSignature
from triptych.pictures.diagram import Arrow, Box, BoxKind, Diagram, Frame, LegendEntry, Line, Picture
from triptych.pictures.grouping import TOP, Grouping, group_nodes
from triptych.pictures.layers import Layer, Run
from triptych.pictures.operators import Describer, class_name, is_drawn, passes_of
from triptych.pictures.values import counted, hint_text, port_text, times

MAX_NAMES: Final = 3
_MEANINGS: Final[Mapping[BoxKind, str]] = {
    "input": "input",
    "output": "output",
    "operators": "operators of a module",
    "state": "operators of a module that use state",
    "port": "from or to outside of the layer",
    "repeat": "layers equal to framed ones",
}


def method_diagram(program: Program, name: str) -> Picture:
    """Fold the graph of one method into a diagram; raises `UsageError` for a name that is no method."""
    if name not in program.methods:
        raise UsageError(f"no method {name!r} to draw; the program has {', '.join(program.methods)}")
    method, passes = program.methods[name], passes_of(program)
    diagram = _diagram(method, group_nodes(program, name), Describer(program, name, passes))
    kinds = {box.kind for box in diagram.boxes()}
    marks = {line.mark for box in diagram.boxes() for line in box.lines}
    legend = [LegendEntry(kind, meaning) for kind, meaning in _MEANINGS.items() if kind in kinds]
    legend += [LegendEntry(number, f"made by {one}") for number, one in enumerate(passes) if number in marks]
    calls = [node for node in method.exported.graph.nodes if node.op == "call_function"]
    about = [", ".join(sorted(map(str, method.roles))), counted(len(calls), "node")]
    if not any(module_path(node) for node in calls):
        about.append("the modules of its nodes are not recorded")
    return Picture(name, "; ".join(about), diagram, tuple(legend))


def _diagram(method: Method, grouping: Grouping, describe: Describer) -> Diagram:
    drawn: list[Box | Frame] = [_port(port, "input") for port in method.inputs]
    drawn += [_box(key, nodes, grouping.paths[key], "", describe) for key, nodes in grouping.boxes.items()]
    shown: dict[object, Run] = {}
    for key, run in grouping.runs.items():
        like = shown.setdefault(run.layers[0].structure, run)
        drawn.append(_frame(key, run, grouping, describe) if like is run else _repeat(key, run, like, describe))
    arrows = dict.fromkeys(
        Arrow(grouping.ends[used], grouping.ends[node])
        for node in grouping.ends
        for used in node.all_input_nodes
        if used in grouping.ends and grouping.ends[used] != grouping.ends[node]
    )
    for port, value in zip(method.outputs, _returned(method), strict=True):
        drawn.append(_port(port, "output"))
        if isinstance(value, Node) and value in grouping.ends:
            arrows[Arrow(grouping.ends[value], f"output {port.name}")] = None
    return Diagram(tuple(drawn), tuple(arrows))


def _port(port: TensorSignature, kind: BoxKind) -> Box:
    return Box(f"{kind} {port.name}", kind, (Line(port_text(port)),), ", ".join(port.links))


def _returned(method: Method) -> Iterator[object]:
    values = method.exported.graph.output_node().args[0]
    assert isinstance(values, (tuple, list))
    for spec, value in zip(method.exported.graph_signature.output_specs, values, strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            yield value


def _box(key: str, nodes: Sequence[Node], path: str, layer: str, describe: Describer) -> Box:
    """Return the box of what the module at `path` computes; what a layer computes itself has no title."""
    title = path.removeprefix(f"{layer}.") if layer else path or TOP
    lines = [] if path == layer and layer else [Line(title, "title")]
    name = class_name(nodes, path)
    if lines and name:
        lines.append(Line(name, "note"))
    lines += describe.lines(nodes, path)
    kind: BoxKind = "state" if describe.uses_state(nodes) else "operators"
    hint = [path or title, *(f"{node.name} = {node.target}" for node in nodes)]
    return Box(key, kind, tuple(lines), hint_text(hint))


# ---------------------------------------------------------------------------------------------------- layers


def _repeat(key: str, run: Run, like: Run, describe: Describer) -> Box:
    first = run.layers[0]
    lines = [Line(times(run.path, len(run.layers)), "title"), Line(f"equal to {like.path}")]
    lines += [Line(f"→ {text}", "value") for text in describe.results(first.nodes)]
    lines += describe.marks(first.nodes)
    return Box(key, "repeat", tuple(lines), hint_text(layer.path for layer in run.layers))


def _frame(key: str, run: Run, grouping: Grouping, describe: Describer) -> Frame:
    """Draw the first layer of `run`, one box for each call of a direct submodule and for what stands between them."""
    layer = run.layers[0]
    drawn: dict[str, Box] = {}
    ends: dict[Node, str] = {}
    nodes = [node for node in layer.nodes if is_drawn(node)]
    for index, (path, group) in enumerate(itertools.groupby(nodes, key=lambda node: _child(layer, node))):
        members = list(group)
        drawn[str(index)] = _box(str(index), members, path, layer.path, describe)
        ends.update(dict.fromkeys(members, str(index)))
    arrows: dict[Arrow, None] = {}
    for slot, node in enumerate(layer.inputs):
        port = _entry(run, slot, grouping)
        if node in grouping.ends:
            drawn.setdefault(port.key, port)
            arrows.update({Arrow(port.key, ends[user]): None for user in node.users if user in ends})
    for node, end in ends.items():
        arrows.update({Arrow(ends[used], end): None for used in node.all_input_nodes if ends.get(used, end) != end})
    leaving = [ends[layer.nodes[index]] for index in sorted(layer.exits) if layer.nodes[index] in ends]
    if leaving:
        drawn["exit"] = _exit(run, grouping)
        arrows.update({Arrow(end, "exit"): None for end in leaving})
    title, note = times(run.path, len(run.layers)), class_name(layer.nodes, layer.path)
    return Frame(key, title, note, Diagram(tuple(drawn.values()), tuple(arrows)))


def _child(layer: Layer, node: Node) -> str:
    """Return the path of the direct submodule of `layer` that `node` lies in, or the layer's own."""
    inner = module_path(node).removeprefix(layer.path).strip(".")
    return f"{layer.path}.{inner.partition('.')[0]}" if inner else layer.path


def _entry(run: Run, slot: int, grouping: Grouping) -> Box:
    """Return the port of an input of the layers: the layer before, or what stands outside of all of them."""
    node = run.layers[0].inputs[slot]
    title = grouping.titles.get(grouping.ends.get(node, ""), node.name)
    if len(run.layers) > 1 and run.layers[1].origins[slot][0] == "layer":
        return Box(f"before {title}", "port", (Line("from the layer before"), Line(f"first: {title}", "note")))
    return Box(f"from {title}", "port", (Line(f"from {title}"),))


def _exit(run: Run, grouping: Grouping) -> Box:
    """Return the port of the results of the layers: the next layer, or what stands outside of all of them."""
    repeats = len(run.layers) > 1 and any(origin[0] == "layer" for origin in run.layers[1].origins)
    inside = {node for layer in run.layers for node in layer.nodes}
    users = [user for layer in run.layers for node in layer.nodes for user in node.users if user not in inside]
    titles = list(dict.fromkeys(grouping.titles[grouping.ends[user]] for user in users if user in grouping.ends))
    if any(user.op == "output" for user in users):
        titles.append("output")
    names = ", ".join([*titles[:MAX_NAMES], *(["…"] if len(titles) > MAX_NAMES else [])])
    if repeats:
        return Box("exit", "port", (Line("to the next layer"), Line(f"last: {names}", "note")))
    return Box("exit", "port", (Line(f"to {names}"),))
