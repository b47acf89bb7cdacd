"""Bisection: which pass of a pipeline, in which method, at which match, breaks parity or the program itself?

A pass is applied in part by holding back its later matches (`MatchLog.match` answers False), so every step of the
search runs the real pass on the real program and is judged by the same oracle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triptych.compiler import manager
from triptych.compiler.editing import GraphEditor
from triptych.compiler.instruments import judge
from triptych.compiler.manager import Select
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle, first_failure, wider
from triptych.compiler.pass_kinds import GraphPass, Match, MatchLog, Pass, ProgramPass, SourceTransform, Tolerance
from triptych.compiler.pipeline import CAPTURE, Pipeline
from triptych.compiler.program import Program
from triptych.compiler.properties import QUANTIZED
from triptych.errors import TriptychError, UsageError, VerificationError

Step = SourceTransform | GraphPass | ProgramPass | None
"""A pass, or None for the capture."""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Problem:
    """What is wrong, and in which method and at which place where that is known."""

    reason: str
    method: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Part:
    """A part of a pass: its first `limit` matches, all where that is None, in `method` ("" but for graph passes)."""

    method: str
    limit: int | None = None

    def select(self, method: str, number: int) -> bool:
        """Let through what belongs to the part."""
        return method == self.method and (self.limit is None or number < self.limit)


@dataclass(frozen=True)
class Culprit:
    """The first guilty step: a pass or "capture", by its place in the pipeline.

    `method` and `match` narrow it down as far as the step can be applied in part; `part` is the least part that is
    wrong, its last match the guilty one, or None where only the whole step is. `reason` is what is wrong when
    everything before the step and that part of it are applied; `before` is what the step was given.
    """

    step: str
    index: int
    reason: str
    before: Model | Program
    guilty: Step = None
    method: str | None = None
    match: Match | None = None
    part: Part | None = None

    def __str__(self) -> str:
        place = f", in {self.method}" if self.method else ""
        if self.match is not None:
            place += ", at " + ", ".join(one for one in (self.match.where, self.match.layer, self.match.line) if one)
        return f"{self.step} (step {self.index + 1}){place}: {self.reason}"


@dataclass(frozen=True)
class Stage:
    """A stage of the compilation with what judges it: the model or program, its oracle, the tolerance declared.

    `promised` are the source transforms so far; what they ensure can be checked once the model is captured.
    """

    subject: Model | Program
    oracle: Oracle
    declared: Tolerance | None = None
    promised: tuple[SourceTransform, ...] = ()

    def problem(self) -> Problem | None:
        """Play every trace; a call that fails is a problem too."""
        try:
            failure = first_failure(judge(self.oracle, self.subject, self.declared))
        except TriptychError as error:
            return _problem_of(error)
        if failure is None:
            return None
        return Problem(str(failure), None if failure.role is None else _method_with(self.subject, failure.role))

    def after(self, step: Step, select: Select | None = None) -> Stage:
        """Apply `step`, or the part of it that `select` lets through."""
        subject = apply_step(step, self.subject, select, self.promised)
        if step is None:
            return Stage(subject, self.oracle, self.declared)
        promised = (*self.promised, step) if isinstance(step, SourceTransform) else ()
        if QUANTIZED in step.ensures and isinstance(subject, Model):
            return Stage(subject, self.oracle.of_quantized(subject), self.declared, promised)
        return Stage(subject, self.oracle, wider(step.tolerances["float32"], self.declared), promised)


def apply_step(
    step: Step, subject: Model | Program, select: Select | None = None, promised: Sequence[SourceTransform] = ()
) -> Model | Program:
    """Return what `step`, or the part of it that `select` lets through, makes of `subject`, held to its contract.

    What the `promised` source transforms ensure is checked where `step` is the capture.
    """
    if step is None:
        assert isinstance(subject, Model), "a program is captured already"
        return manager.run_capture(subject, promised)
    if isinstance(step, SourceTransform):
        assert isinstance(subject, Model), "source transforms come before capture"
        model, _ = manager.run_source(subject, [step], select=select)
        return model
    assert isinstance(subject, Program), "graph and program passes come after capture"
    program, _ = manager.run_program(subject, [step], select=select)
    return program


def steps_of(pipeline: Pipeline) -> list[Step]:
    """Return the steps of `pipeline` in order; `Culprit.index` counts in them."""
    return [*pipeline.source, *([None] if pipeline.captures else []), *pipeline.program]


def bisect(
    subject: Model | Program, pipeline: Pipeline, oracle: Oracle, report: Report = lambda step: None
) -> Culprit | None:
    """Return the first guilty step of `pipeline` run on `subject`, or None where everything holds.

    `subject` is the model that `oracle` knows, or a program captured from it and graph passes to run on that.
    Raises `UsageError` where the pipeline is empty, and where the subject fails the traces before any pass.
    """
    steps = steps_of(pipeline)
    if not steps:
        raise UsageError("the pipeline is empty; there is nothing to search")
    stages = [Stage(subject, oracle)]
    own = stages[0].problem()
    if own is not None:
        raise UsageError(f"the traces fail before any pass: {own.reason}; begin the search earlier")
    raised: Problem | None = None
    for step in steps:
        report(f"run {_name(step)}")
        try:
            stages.append(stages[-1].after(step))
        except TriptychError as error:
            raised = _problem_of(error)
            break
    report(f"check after {_name(steps[len(stages) - 2])}" if len(stages) > 1 else "check")
    problem = stages[-1].problem()
    if problem is None:
        return None if raised is None else _narrowed(stages[-1], steps, len(stages) - 1, raised, report)
    good, bad = 0, len(stages) - 1
    while bad - good > 1:
        middle = (good + bad) // 2
        report(f"check after {_name(steps[middle - 1])}")
        found = stages[middle].problem()
        good, bad, problem = (middle, bad, problem) if found is None else (good, middle, found)
    return _narrowed(stages[good], steps, good, problem, report)


def _narrowed(before: Stage, steps: list[Step], index: int, problem: Problem, report: Report) -> Culprit:
    """Find the method and the match; a pass that cannot be taken apart is named whole."""
    guilty = steps[index]
    if guilty is None:
        return Culprit(CAPTURE, index, problem.reason, before.subject, None, problem.method)
    subject = before.subject
    methods = list(subject.methods) if isinstance(guilty, GraphPass) and isinstance(subject, Program) else [""]

    def apply(part: Part) -> Problem | None:
        try:
            return before.after(guilty, part.select).problem()
        except TriptychError as error:
            return _problem_of(error)

    # What fails with every match held back fails in no method and at no match of its own.
    for method in methods if apply(Part("", 0)) is None else []:
        report(f"{_name(guilty)} in {method or 'the model'} alone")
        whole = Part(method)
        alone = apply(whole)
        if alone is None:
            continue
        named = method or alone.method
        total = len(_announced(guilty, subject, method, None))
        if guilty.indivisible or not total:
            return Culprit(_name(guilty), index, alone.reason, subject, guilty, named, part=whole)
        good, bad, reason = 0, total, alone.reason
        while bad - good > 1:
            middle = (good + bad) // 2
            report(f"{_name(guilty)} in {method or 'the model'}, {middle} of {total} matches")
            found = apply(Part(method, middle))
            good, bad, reason = (middle, bad, reason) if found is None else (good, middle, found.reason)
        match = _announced(guilty, subject, method, bad)[-1]
        return Culprit(_name(guilty), index, reason, subject, guilty, named, match, Part(method, bad))
    place = Match(problem.place, problem.method) if problem.place is not None else None
    return Culprit(_name(guilty), index, problem.reason, subject, guilty, problem.method, place)


def _announced(one: Pass, subject: Model | Program, method: str, limit: int | None) -> list[Match]:
    """Return the first `limit` matches that a pass announces, also where it then fails."""
    log = MatchLog(method or None, lambda number: limit is None or number < limit)
    with contextlib.suppress(Exception):
        if isinstance(one, GraphPass) and isinstance(subject, Program):
            chosen = subject.methods[method]
            one.rewrite(GraphEditor(chosen.exported, one.name), chosen, log)
        elif isinstance(one, ProgramPass) and isinstance(subject, Program):
            one.rewrite(subject, log)
        elif isinstance(one, SourceTransform) and isinstance(subject, Model):
            one.transform(subject.with_own_modules(), log)
    return log.matches


def _problem_of(error: TriptychError) -> Problem:
    if isinstance(error, VerificationError):
        return Problem(str(error), error.method, error.place)
    return Problem(str(error))


def _name(step: Step) -> str:
    return CAPTURE if step is None else step.name


def _method_with(subject: Model | Program, role: str) -> str | None:
    entries = (
        [(name, method.roles) for name, method in subject.methods.items()]
        if isinstance(subject, Program)
        else [(entry.name, entry.roles) for entry in subject.entry_points]
    )
    return next((name for name, roles in entries if role in map(str, roles)), None)
