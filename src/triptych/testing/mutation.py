"""Mutation: wrong variants of a right program, and who notices.

A pass author who trusts a set of traces can measure what they see::

    oracle = Oracle(model, make_plans(subject_of(model), tokens=3))
    for verdict in survivors(program, oracle, sample(mutations(program), 300)):
        print(verdict)

Every variant is made by a pass that the manager runs, so the structural verification has its say; what passes it is
played by the oracle. A variant that neither catches is a survivor: harmless, or a blind spot of the traces.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import ClassVar, Literal

from triptych.compiler.editing import GraphEditor
from triptych.compiler.manager import run_program
from triptych.compiler.oracle import Oracle, TraceReport, first_failure
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.provenance import layer_in, layer_of
from triptych.errors import UsageError, VerificationError
from triptych.testing.sites import Site, value_numbers
from triptych.testing.wrong_edits import KINDS

__all__ = ["KINDS", "Mutation", "Verdict", "apply", "judge", "mutations", "sample", "survivors"]

Catcher = Literal["verifier", "run time", "oracle"]


@dataclass(frozen=True)
class Mutation:
    """One wrong edit: its kind, the method, the node or tensor it is made at, its layer, and what is done there."""

    kind: str
    method: str
    place: str
    detail: str
    layer: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} in {self.method}, {self.place}: {self.detail}"


@dataclass(frozen=True)
class Verdict:
    """Who caught a mutation and why, or None and by how much it moved the outputs at most.

    `moved` is the largest relative difference of any output or state row, `kl` the largest KL of any logits in
    nats; both are NaN for a mutation that is caught.
    """

    mutation: Mutation
    caught_by: Catcher | None
    reason: str
    moved: float = float("nan")
    kl: float = float("nan")

    def __str__(self) -> str:
        return f"{self.mutation}: {self.caught_by or 'survives'}, {self.reason}"


@dataclass(frozen=True)
class _Mutate(ProgramPass):
    """Make one wrong edit."""

    name: ClassVar[str] = "mutate"

    mutation: Mutation

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Edit the one method; `UsageError` where the mutation is not one of `program`."""
        wanted = self.mutation
        if wanted.kind in KINDS and wanted.method in program.methods:
            editor = GraphEditor(program.methods[wanted.method].exported, self.name)
            for site in _sites(program, wanted.method, editor):
                if _place(site) != wanted.place:
                    continue
                for detail, change in KINDS[wanted.kind](site):
                    if detail == wanted.detail and log.match(site.node):
                        change()
                        return program.with_exported({wanted.method: editor.finish()})
        raise UsageError(f"the program has no place for the mutation '{wanted}'; take it from mutations(program)")


def mutations(program: Program, *, kinds: Iterable[str] | None = None) -> Iterator[Mutation]:
    """Yield every mutation of `program`, method by method and node by node, in an order that never changes.

    `kinds` are some of `KINDS`; without it all are meant. Raises `UsageError` for an unknown kind.
    """
    chosen = tuple(KINDS) if kinds is None else tuple(kinds)
    for kind in chosen:
        if kind not in KINDS:
            raise UsageError(f"{kind!r} is no kind of mutation; the kinds are {', '.join(KINDS)}")
    for name, method in program.methods.items():
        for site in _sites(program, name, GraphEditor(method.exported)):
            layer = layer_of(site.node) if site.bound is None else layer_in(site.bound)
            for kind in chosen:
                for detail, _ in KINDS[kind](site):
                    yield Mutation(kind, name, _place(site), detail, layer)


def sample(found: Iterable[Mutation], count: int, *, seed: int = 0) -> list[Mutation]:
    """Choose `count` mutations evenly over kinds, within a kind over methods, and within a method over layers.

    A group that has fewer than its share gives all it has, and the others make up for it.
    """
    return _in_turn(list(found), ("kind", "method", "layer"), random.Random(seed))[:count]


def _in_turn(found: list[Mutation], fields: tuple[str, ...], chance: random.Random) -> list[Mutation]:
    """Order `found` so that groups of equal first field take turns, each group ordered so by the other fields."""
    chance.shuffle(found)
    if not fields:
        return found
    groups: dict[object, list[Mutation]] = {}
    for one in found:
        groups.setdefault(getattr(one, fields[0]), []).append(one)
    turns = zip_longest(*(_in_turn(group, fields[1:], chance) for group in groups.values()))
    return [one for turn in turns for one in turn if one is not None]


def apply(program: Program, mutation: Mutation) -> Program:
    """Return the wrong variant, through the pass manager and its verification.

    Raises `VerificationError` where the verification refuses the variant, `UsageError` where `program` has no
    place for the mutation.
    """
    mutated, _ = run_program(program, [_Mutate(mutation)])
    return mutated


def judge(program: Program, oracle: Oracle, mutation: Mutation) -> Verdict:
    """Say who catches the variant; the traces after the first that fails are not played."""
    try:
        mutated = apply(program, mutation)
    except VerificationError as error:
        return Verdict(mutation, "verifier", str(error))
    runner = ProgramRunner(mutated)
    played: list[TraceReport] = []

    def reports() -> Iterator[TraceReport]:
        for one in oracle.judge(runner, runner.methods):
            played.append(one)
            yield one

    try:
        failure = first_failure(reports())
    except VerificationError as error:
        return Verdict(mutation, "run time", str(error))
    if failure is not None:
        return Verdict(mutation, "oracle", str(failure))
    moved = max((one.comparison.worst_relative for one in played), default=0.0)
    kl = max((kl for one in played for kl in one.comparison.kls), default=0.0)
    return Verdict(mutation, None, f"moves outputs by {moved:.2g} and logits by KL {kl:.2g}", moved, kl)


def survivors(
    program: Program,
    oracle: Oracle,
    chosen: Iterable[Mutation],
    report: Callable[[Verdict], None] = lambda verdict: None,
) -> tuple[Verdict, ...]:
    """Return the verdicts on the mutations that nothing catches; `report` is called with every verdict."""
    left = []
    for mutation in chosen:
        verdict = judge(program, oracle, mutation)
        report(verdict)
        if verdict.caught_by is None:
            left.append(verdict)
    return tuple(left)


def _sites(program: Program, name: str, editor: GraphEditor) -> Iterator[Site]:
    """Yield the nodes that something depends on: an edit of any other changes nothing."""
    editor.graph.eliminate_dead_code()
    numbers, state = value_numbers(editor.graph), frozenset(program.state)
    for node in list(editor.graph.nodes):
        if node.op != "placeholder" or node.users:
            yield Site(editor, program.methods[name], node, state, numbers)


def _place(site: Site) -> str:
    return site.bound or site.node.name
