"""Instruments: what can be watched while passes run. None of it is code in a pass.

================  =================================================================================
`PrintIR`         the text of the program before, after, or after each pass that changed it
`Diff`            the changed lines of that text
`CostWatch`       what each pass changed of the cost of each method
`Statistics`      how many calls of which operator each pass added and took away, by method
`NumericCheck`    parity with the user's model after each pass, on whole call traces
================  =================================================================================

Times, matches and refusals are in the results of a run without any instrument; `coverage` makes a matrix of them.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from triptych.compiler.cost import MethodCost, cost_delta, program_cost
from triptych.compiler.manager import Instrument, PassResult
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle, TraceReport, first_failure, wider
from triptych.compiler.pass_kinds import Pass, Tolerance
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ModelRunner, ProgramRunner
from triptych.compiler.properties import QUANTIZED
from triptych.compiler.text import program_text
from triptych.errors import VerificationError

Write = Callable[[str], None]
_ADVICE: Final = "pass developer: `triptych passes bisect` names the method and the match"


def subject_text(subject: Model | Program) -> str:
    """Return what a person reads of a program (its IR) or of a model (its module tree)."""
    return program_text(subject) if isinstance(subject, Program) else f"{subject.module}\n"


@dataclass(frozen=True)
class PrintIR(Instrument):
    """Writes the whole text around each pass: "before", "after", or "changed" (after those that changed it)."""

    when: Literal["before", "after", "changed"]
    write: Write

    def before(self, one: Pass, subject: Model | Program) -> None:
        """Write the text before the pass, where that is asked for."""
        if self.when == "before":
            self.write(f"// before {one.name}\n{subject_text(subject)}")

    def after(self, one: Pass, before: Model | Program, after: Model | Program, result: PassResult) -> None:
        """Write the text after the pass, where that is asked for."""
        if self.when == "after" or (self.when == "changed" and result.changed):
            self.write(f"// after {one.name}\n{subject_text(after)}")


@dataclass(frozen=True)
class Diff(Instrument):
    """Writes a unified diff of the text for each pass that changed it."""

    write: Write

    def after(self, one: Pass, before: Model | Program, after: Model | Program, result: PassResult) -> None:
        """Write the diff."""
        if result.changed:
            self.write(text_diff(subject_text(before), subject_text(after), f"before {one.name}", f"after {one.name}"))


def text_diff(before: str, after: str, before_name: str, after_name: str) -> str:
    """Return a unified diff of two IR texts; values are renumbered by a change, so their numbers are left out."""
    old, new = (_without_numbers(text).splitlines() for text in (before, after))
    return "\n".join(difflib.unified_diff(old, new, before_name, after_name, lineterm="", n=2)) + "\n"


def _without_numbers(text: str) -> str:
    """Drop the left side of assignments; every use keeps its number, so moved values stay visible."""
    lines = []
    for line in text.splitlines():
        name, equals, rest = line.partition(" = ")
        lines.append(f"    {rest}" if equals and name.strip().startswith("%") else line)
    return "\n".join(lines)


@dataclass(frozen=True)
class OperatorChange:
    """How often a pass made a method call an operator more (positive) or less (negative) often than before."""

    pass_name: str
    method: str
    operator: str
    count: int


@dataclass(frozen=True)
class Statistics(Instrument):
    """Counts operator calls around each graph and program pass."""

    changes: list[OperatorChange] = field(default_factory=list)

    def after(self, one: Pass, before: Model | Program, after: Model | Program, result: PassResult) -> None:
        """Record what changed."""
        if not (result.changed and isinstance(before, Program) and isinstance(after, Program)):
            return
        for method in dict.fromkeys([*before.methods, *after.methods]):
            counts = operator_counts(after, method)
            counts.subtract(operator_counts(before, method))
            self.changes.extend(
                OperatorChange(one.name, method, operator, count) for operator, count in sorted(counts.items()) if count
            )


def operator_counts(program: Program, method: str) -> Counter[str]:
    """Return how often `method` calls each operator; nothing where the program has no such method."""
    if method not in program.methods:
        return Counter()
    nodes = program.methods[method].exported.graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


@dataclass(frozen=True)
class CostWatch(Instrument):
    """Records what each graph and program pass changed of the cost of each method, at sizes of dynamic dimensions."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    deltas: dict[str, dict[str, MethodCost]] = field(default_factory=dict)

    def after(self, one: Pass, before: Model | Program, after: Model | Program, result: PassResult) -> None:
        """Record the difference."""
        if result.changed and isinstance(before, Program) and isinstance(after, Program):
            delta = cost_delta(program_cost(before, self.sizes), program_cost(after, self.sizes))
            self.deltas[one.name] = delta


class NumericCheck(Instrument):
    """Holds every stage to parity with the user's model; the first pass that leaves it fails by name.

    A quantizing pass moves the reference: from there on it is the quantized model in eager.
    """

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.reports: dict[str, tuple[TraceReport, ...]] = {}
        self._declared: Tolerance | None = None

    def after(self, one: Pass, before: Model | Program, after: Model | Program, result: PassResult) -> None:
        """Play the traces on `after`."""
        if not result.changed:
            return
        if QUANTIZED in one.ensures and isinstance(after, Model):
            self.oracle = self.oracle.of_quantized(after)
            return
        self._declared = wider(one.tolerances["float32"], self._declared)
        try:
            reports = tuple(judge(self.oracle, after, self._declared))
        except VerificationError as error:
            raise VerificationError(f"after pass {one.name} {error}; {_ADVICE}", method=error.method) from error
        self.reports[one.name] = reports
        problem = first_failure(reports)
        if problem is not None:
            raise VerificationError(f"after pass {one.name} the model computes something else: {problem}; {_ADVICE}")


def judge(oracle: Oracle, subject: Model | Program, declared: Tolerance | None = None) -> Iterable[TraceReport]:
    """Judge a stage of a compilation; a model that keeps no past yet plays each trace as one prefill."""
    if isinstance(subject, Program):
        program = ProgramRunner(subject)
        return oracle.within(subject.metadata.kept_tokens).judge(program, program.methods, declared=declared)
    model = ModelRunner(subject)
    if model.has_cache:
        return oracle.judge(model, model.methods, declared=declared)
    return oracle.judge_whole(model, model.methods, declared)


def coverage(results: Sequence[PassResult], methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return pass → method → what it did there: "3 matches", the first reason against, or "no candidate".

    Source and program passes, which do not work by method, stand under "all".
    """
    table: dict[str, dict[str, str]] = {}
    for result in results:
        by_method = any({match.method for match in result.matches} | {one.method for one in result.refusals})
        columns = methods if by_method else ("all",)
        table[result.name] = {column: _covered(result, column if by_method else None) for column in columns}
    return table


def _covered(result: PassResult, method: str | None) -> str:
    count = sum(match.method == method for match in result.matches)
    refusals = [refusal for refusal in result.refusals if refusal.method == method]
    if count:
        return f"{count} matches" + (f", {len(refusals)} refused" if refusals else "")
    return f"refused: {refusals[0].where}: {refusals[0].reason}" if refusals else "no candidate"
