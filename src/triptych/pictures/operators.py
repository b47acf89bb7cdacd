"""What a box says of the operators in it: their counts, weights, state, results and the passes that made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.fx import Node

from triptych.compiler.editing import bound_names
from triptych.compiler.program import Program
from triptych.compiler.provenance import CAPTURE, made_by
from triptych.compiler.text import dimension_names, tensor_text
from triptych.pictures.diagram import Line
from triptych.pictures.values import bytes_text, counted, tensors_in, times

MAX_RESULTS: Final = 3
_READS: Final = ("aten::item", "aten::_local_scalar_dense")


def passes_of(program: Program) -> list[str]:
    """Return the names of the passes that made nodes of `program`, sorted; their places are the numbers of marks."""
    nodes = (node for method in program.methods.values() for node in method.exported.graph.nodes)
    return sorted({made_by(node) for node in nodes} - {CAPTURE})


def is_drawn(node: Node) -> bool:
    """True for calls that compute tensors, change some, or read numbers from some.

    Arithmetic on sizes and assertions are left out.
    """
    if node.op != "call_function":
        return False
    return is_mutable(node) or next(tensors_in(node.meta.get("val")), None) is not None or _is_number_read(node)


def _is_number_read(node: Node) -> bool:
    """True where the value is a number that comes from the content of a tensor, and not from its size."""
    if not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat)):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.name in _READS:
        return True
    return any(_is_number_read(one) for one in node.all_input_nodes)


def is_mutable(node: Node) -> bool:
    """True for calls that change one of their inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and bool(node.target._schema.is_mutable)


def operator_name(node: Node) -> str:
    """Return the name of an operator without its namespace and overload, such as "linear"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.rpartition("::")[2]
    name: str = getattr(node.target, "__name__", str(node.target))
    return name


def class_name(nodes: Sequence[Node], path: str) -> str:
    """Return the class of the module at `path`, as the nodes in it recorded it; "" where none did."""
    for node in nodes:
        for place, kind in (node.meta.get("nn_module_stack") or {}).values():
            if place == path and path:
                name = kind if isinstance(kind, str) else kind.__qualname__
                return str(name).rpartition(".")[2]
    return ""


@dataclass(frozen=True)
class Describer:
    """Describes groups of nodes of one method. `passes` gives the numbers of the marks."""

    program: Program
    method: str
    passes: Sequence[str]

    def lines(self, nodes: Sequence[Node], path: str) -> Iterator[Line]:
        """Yield the lines about `nodes`, which the module at `path` computes."""
        calls = [node for node in nodes if is_drawn(node) and operator_name(node) != "getitem"]
        yield Line(_counts(calls))
        bound = bound_names(self.program.methods[self.method].exported)
        used = {bound[one.name] for node in calls for one in node.all_input_nodes if one.name in bound}
        weights = self._weight_sizes()
        sizes = [weights[name] for name in sorted(used) if name in weights]
        if sizes:
            yield Line(f"{counted(len(sizes), 'weight')}, {bytes_text(sum(sizes))}", "note")
        rows = sorted(name for name in used if name in self.program.state)
        if rows:
            yield Line(f"state {', '.join(_within(name, path) for name in rows)}", "note")
        results = self.results(nodes)
        if not results and not any(is_mutable(node) for node in calls):
            yield Line("result not used", "note")
        yield from (Line(f"→ {text}", "value") for text in results)
        yield from self.marks(nodes)

    def marks(self, nodes: Sequence[Node]) -> Iterator[Line]:
        """Yield a line for each pass that made some of `nodes`."""
        made = Counter(made_by(node) for node in nodes)
        for number, name in enumerate(self.passes):
            if made[name]:
                yield Line(times(name, made[name]), "note", mark=number)

    def uses_state(self, nodes: Sequence[Node]) -> bool:
        """True where one of `nodes` reads or writes a state row."""
        bound = bound_names(self.program.methods[self.method].exported)
        return any(bound.get(one.name) in self.program.state for node in nodes for one in node.all_input_nodes)

    def results(self, nodes: Sequence[Node]) -> list[str]:
        """Return dtype and shape of what others take from `nodes`, each once."""
        inside = set(nodes)
        names = dimension_names(self.program.methods[self.method])
        taken = [node for node in nodes if any(user not in inside for user in node.users)]
        texts = [tensor_text(value, names) for node in taken for value in tensors_in(node.meta.get("val"))]
        texts += ["number" for node in taken if _is_number_read(node)]
        found = list(dict.fromkeys(texts))
        more = [f"{len(found) - MAX_RESULTS} more"] if len(found) > MAX_RESULTS else []
        return found[:MAX_RESULTS] + more

    def _weight_sizes(self) -> Mapping[str, int]:
        return {
            use.name: weight.nbytes
            for weight in self.program.weights.values()
            for use in weight.uses
            if use.method == self.method
        }


def _counts(calls: Sequence[Node]) -> str:
    """Return the operators with their numbers, in order of first call; views come last, as one."""
    views = Counter(operator_name(node) for node in calls if _is_view(node))
    others = Counter(operator_name(node) for node in calls if not _is_view(node))
    if others and views:
        others["views"] = views.total()
    return ", ".join(times(name, count) for name, count in (others or views).items())


def _is_view(node: Node) -> bool:
    """True where the result is the first input seen in another shape, which costs nothing."""
    if not isinstance(node.target, torch._ops.OpOverload) or is_mutable(node):
        return False
    given = next((one.meta.get("val") for one in node.all_input_nodes), None)
    result = next(tensors_in(node.meta.get("val")), None)
    aliases = any(value.alias_info is not None for value in node.target._schema.returns)
    return aliases and isinstance(given, torch.Tensor) and result is not None and given.dtype == result.dtype


def _within(name: str, path: str) -> str:
    """Return the last parts of a state row's name, which tell the rows of one module apart."""
    relative = name.removeprefix(f"{path}.") if path else name
    return ".".join(relative.split(".")[-2:])
