"""A program as a diagram: its methods, and the state rows and weights that they share.

State rows with the same readers and writers stand in one box, weights with the same users in another; in a box,
names that differ by layer number only are one line. So the diagram of 30 layers is as large as that of two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from triptych.compiler.program import Program, StateRow, Weight
from triptych.compiler.text import dtype_text
from triptych.pictures.diagram import Arrow, ArrowKind, Box, Diagram, LegendEntry, Line, Picture
from triptych.pictures.values import (
    bytes_text,
    counted,
    folded_name,
    hint_text,
    name_pattern,
    port_text,
    times,
)

MAX_LINES: Final = 6
_MEANINGS: Final = {
    "method": "method with its inputs and outputs",
    "weight": "weights with the same users",
    "state": "state rows with the same readers and writers",
    "feeds": "an output is the input of another method",
    "uses": "a method uses weights",
    "reads": "a method reads state",
    "writes": "a method writes state",
    "updates": "a method reads and writes state",
}


def program_diagram(program: Program) -> Picture:
    """Fold the nodes and edges of `program.graph` into a diagram."""
    boxes: dict[str, Box] = {}
    members: dict[str, str] = {}
    for rows in _grouped(program.state.values(), lambda row: (row.readers, row.writers)):
        box = _state_box(rows)
        boxes[box.key] = box
        members.update({f"state:{row.name}": box.key for row in rows})
    for weights in _grouped(program.weights.values(), lambda weight: weight.users):
        box = _weight_box(weights)
        boxes[box.key] = box
        members.update({f"weight:{weight.key}": box.key for weight in weights})
    for name in program.methods:
        box = _method_box(program, name)
        boxes[box.key] = box
        members[box.key] = box.key
    arrows = _arrows(program, members)
    used = {box.kind for box in boxes.values()} | {arrow.kind for arrow in arrows}
    legend = tuple(LegendEntry(kind, meaning) for kind, meaning in _MEANINGS.items() if kind in used)
    counts = ", ".join(
        [
            counted(len(program.methods), "method"),
            counted(len(program.state), "state row"),
            counted(len(program.weights), "weight"),
        ]
    )
    subtitle = f"{counts}; context {program.metadata.max_context}, vocabulary {program.metadata.vocab_size}"
    return Picture("program", subtitle, Diagram(tuple(boxes.values()), arrows), legend)


T = TypeVar("T")


def _grouped(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    groups: dict[object, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


# ---------------------------------------------------------------------------------------------------- boxes


def _method_box(program: Program, name: str) -> Box:
    method = program.methods[name]
    roles = ", ".join(sorted(map(str, method.roles)))
    operators = sum(node.op == "call_function" for node in method.exported.graph.nodes)
    lines = [Line(name, "title"), Line(f"{roles}; {counted(operators, 'node')}", "note")]
    lines += [Line(f"in  {port_text(port)}") for port in method.inputs]
    lines += [Line(f"out {port_text(port)}") for port in method.outputs]
    lines += [
        Line(f"{link.partition('.')[2]} feeds {port.name} of its next call", "note")
        for port in method.inputs
        for link in port.links
        if link.startswith(f"{name}.")
    ]
    links = [f"{port.name} ← {', '.join(port.links)}" for port in method.inputs if port.links]
    links += [f"{port.name} → {', '.join(port.links)}" for port in method.outputs if port.links]
    return Box(f"method:{name}", "method", tuple(lines), hint_text([name, *links]))


def _state_box(rows: Sequence[StateRow]) -> Box:
    total = sum(_row_bytes(row) for row in rows)
    lines = [Line(f"{counted(len(rows), 'state row')}, {bytes_text(total)}", "title")]
    folded = _grouped(rows, lambda row: (name_pattern(row.name), row.shape, row.dtype, row.layout))
    for group in folded[:MAX_LINES]:
        first = group[0]
        layout = "" if first.layout == "any" else f" {first.layout}"
        size = bytes_text(sum(_row_bytes(row) for row in group))
        tensor = f"{dtype_text(first.dtype)}{list(first.shape)}"
        lines.append(Line(folded_name([row.name for row in group])))
        lines.append(Line(f"  {times(tensor, len(group))}{layout}, {size}", "note"))
    lines += _more(len(folded), "names")
    return Box(f"state:{rows[0].name}", "state", tuple(lines), hint_text(row.name for row in rows))


def _more(count: int, what: str) -> list[Line]:
    return [Line(f"and {count - MAX_LINES} more {what}", "note")] if count > MAX_LINES else []


def _row_bytes(row: StateRow) -> int:
    return row.initial.numel() * row.initial.element_size()


def _weight_box(weights: Sequence[Weight]) -> Box:
    total = sum(weight.nbytes for weight in weights)
    lines = [Line(f"{counted(len(weights), 'weight')}, {bytes_text(total)}", "title")]
    components = _by_component(weights)
    for prefix, group in list(components.items())[:MAX_LINES]:
        size = bytes_text(sum(weight.nbytes for weight in group))
        dtypes = ", ".join(sorted({dtype_text(weight.dtype) for weight in group}))
        lines.append(Line(prefix))
        lines.append(Line(f"  {counted(len(group), 'weight')}, {dtypes}, {size}", "note"))
    lines += _more(len(components), "modules")
    tied = [" = ".join(weight.names) for weight in weights if len(weight.names) > 1]
    lines += [Line(f"tied: {names}", "note") for names in tied[:MAX_LINES]]
    lines += _more(len(tied), "tied weights")
    return Box(f"weight:{weights[0].key}", "weight", tuple(lines), hint_text(weight.key for weight in weights))


def _by_component(weights: Sequence[Weight]) -> dict[str, list[Weight]]:
    """Group weights by the modules they belong to, as finely as a few lines allow; ".*" stands for inner modules."""
    modules = {weight.key: _module(weight.key) for weight in weights}
    depth = max(len(module) for module in modules.values())
    while depth > 1 and len({module[:depth] for module in modules.values()}) > MAX_LINES:
        depth -= 1
    groups: dict[str, list[Weight]] = {}
    for group in _grouped(weights, lambda weight: modules[weight.key][:depth]):
        prefix = modules[group[0].key][:depth]
        cut = any(len(modules[weight.key]) > depth for weight in group)
        groups[".".join([*prefix, *(["*"] if cut else [])])] = group
    return groups


def _module(key: str) -> tuple[str, ...]:
    """Return the path of the module that holds a weight, "*" for its first number and all that follows."""
    parts = key.partition("@")[0].split(".")
    module = parts[:-1] or parts
    number = next((index for index, part in enumerate(module) if part.isdigit()), None)
    return tuple(module) if number is None else (*module[:number], "*")


# ---------------------------------------------------------------------------------------------------- arrows


def _arrows(program: Program, members: dict[str, str]) -> tuple[Arrow, ...]:
    """Return one arrow for each pair of boxes; a method that reads and writes the same rows updates them."""
    feeds: dict[tuple[str, str], list[str]] = {}
    found: dict[ArrowKind, set[tuple[str, str]]] = {"uses": set(), "reads": set(), "writes": set()}
    for source, target, data in program.graph.edges(data=True):
        ends = members[source], members[target]
        if ends[0] == ends[1]:
            continue  # the box of the method says it
        if data["kind"] == "feeds":
            name = data["input"] if data["input"] == data["output"] else f"{data['output']} as {data['input']}"
            feeds.setdefault(ends, []).append(name)
        else:
            found[data["kind"]].add(ends)
    updates = {(method, state) for method, state in found["writes"] if (state, method) in found["reads"]}
    found["writes"] -= updates
    found["reads"] -= {(state, method) for method, state in updates}
    arrows = [Arrow(*ends, "feeds", ", ".join(names)) for ends, names in feeds.items()]
    arrows += [Arrow(*ends, "updates") for ends in updates]
    arrows += [Arrow(*ends, kind) for kind, pairs in found.items() for ends in pairs]
    return tuple(sorted(arrows, key=lambda arrow: (arrow.source, arrow.target, arrow.kind)))
