"""Why a pass matched or did not, place by place and node by node, without changing anything."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.matching import shown
from triptych.compiler.pass_kinds import GraphPass, Match, MatchLog, Refusal
from triptych.compiler.program import Method
from triptych.compiler.provenance import layer_of, source_line
from triptych.compiler.rewrite_rule import Attempt, RewriteRule, sweep, traced_pattern
from triptych.errors import VerificationError


@dataclass(frozen=True)
class Candidate:
    """A place that a pass looked at.

    `where` names it (a node, a module), None where the method has no candidate at all. `reason` is why the pass left
    it alone, None where it matched. `trail` lists the nodes that fitted until then, the candidate first.
    """

    method: str | None
    where: str | None
    reason: str | None = None
    operator: str | None = None
    line: str | None = None
    layer: str | None = None
    trail: tuple[str, ...] = ()

    @property
    def matched(self) -> bool:
        """True where the pass rewrites the place."""
        return self.reason is None

    def __str__(self) -> str:
        name = self.where if self.operator is None else f"%{self.where} {self.operator}"
        known = ", ".join(one for one in (self.line, self.layer) if one)
        place = ": ".join(one for one in (self.method, name) if one) + (f" ({known})" if known else "")
        return f"{place}: {self.reason or 'matches'}"


def explain(one: GraphPass, method_name: str, method: Method) -> tuple[Candidate, ...]:
    """Say of every candidate of `one` in a method whether it matches, and if not, why.

    A rule's candidates are the nodes with the operator that its pattern ends in, in order; where the graph has none,
    one candidate says which operators the pattern needs. Of other passes it is the places they announce or refuse.
    The pass runs on a copy of the graph. Raises `VerificationError` for a rule whose pattern is wrong.
    """
    editor, log = GraphEditor(method.exported, one.name), MatchLog(method_name)
    nodes = {node.name: node for node in method.exported.graph.nodes}
    if not isinstance(one, RewriteRule):
        one.rewrite(editor, method, log)
        return from_run(log.matches, log.refusals, nodes)
    traced_pattern(one)
    found: list[Candidate] = []
    try:
        found.extend(_candidate(method_name, attempt) for attempt in sweep(one, editor, log))
    except VerificationError as error:
        node = nodes.get(error.place or "")
        found.append(_located(Candidate(method_name, error.place, str(error)), node))
    return tuple(found) or (Candidate(method_name, None, _needs(one, list(nodes.values()))),)


def from_run(
    matches: Iterable[Match], refusals: Iterable[Refusal], nodes: Mapping[str, Node] | None = None
) -> tuple[Candidate, ...]:
    """Make candidates of what a pass recorded, matches first; `nodes` by name add operators and layers."""
    matched = [Candidate(one.method, one.where, line=one.line, layer=one.layer) for one in matches]
    refused = [Candidate(one.method, one.where, one.reason, line=one.line) for one in refusals]
    return tuple(_located(one, (nodes or {}).get(one.where or "")) for one in [*matched, *refused])


def explanation_text(name: str, candidates: Sequence[Candidate]) -> str:
    """Return what `explain` found for the pass called `name` as text, a line for each candidate."""
    places = [one for one in candidates if one.where is not None]
    count = f"{sum(one.matched for one in places)} of {len(places)} candidates match" if places else "no candidate"
    lines = [f"{name}: {count}"]
    for one in candidates:
        lines.append(f"  {one}")
        if not one.matched and len(one.trail) > 1:
            lines.append(f"    until then fitted {', '.join(one.trail)}")
    return "\n".join(lines) + "\n"


def _candidate(method: str, attempt: Attempt) -> Candidate:
    trail = tuple(shown(found) for _, found in attempt.matched)
    return _located(Candidate(method, attempt.anchor.name, attempt.reason, trail=trail), attempt.anchor)


def _located(one: Candidate, node: Node | None) -> Candidate:
    if node is None:
        return one
    operator = None if node.op != "call_function" else str(node.target)
    return Candidate(one.method, one.where, one.reason, operator, source_line(node), layer_of(node), one.trail)


def _needs(rule: RewriteRule, nodes: Sequence[Node]) -> str:
    """Say which operators the pattern needs, and which of the graph are called nearly like those it lacks."""
    pattern = traced_pattern(rule)
    present = sorted({str(node.target) for node in nodes if isinstance(node.target, OpOverload)})
    packets = {name.rpartition(".")[0] for name in present}
    needed = dict.fromkeys(str(node.target) for node in pattern.calls)
    lacking = [name for name in needed if name not in present and name not in packets]
    by_name: dict[str, list[str]] = {}
    for name in present:
        by_name.setdefault(name.split(".")[1], []).append(name)
    close = [one for name in lacking for one in difflib.get_close_matches(name.split(".")[1], by_name, n=3, cutoff=0.5)]
    nearest = ", ".join(one for base in dict.fromkeys(close) for one in by_name[base]) or "none"
    return (
        f"the graph has no {pattern.outputs[0].target}, in which the pattern ends; the pattern needs "
        f"{', '.join(needed)}, the graph lacks {', '.join(lacking)}; nearest by name: {nearest}"
    )
