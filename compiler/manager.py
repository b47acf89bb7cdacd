"""The pass manager: runs a pipeline and holds every pass to its contract.

After each pass it rebuilds the program, finds out by itself whether anything changed, and verifies the
structure. A pass that matched nothing, or that broke the program, fails the pipeline by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import GraphPass, MatchLog, Pass, ProgramPass, Refusal, SourceTransform
from triptych.compiler.program import Program
from triptych.compiler.text import method_text, program_text
from triptych.compiler.verifier import verify
from triptych.errors import PipelineError, TriptychError, VerificationError


@dataclass(frozen=True)
class PassResult:
    """What one pass did: places matched and refused, whether the program changed, and how long it took."""

    name: str
    matches: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    changed: bool
    seconds: float


T = TypeVar("T")
Report = Callable[[str], None]


def run_source(
    model: Model, passes: Iterable[SourceTransform], report: Report = lambda name: None
) -> tuple[Model, tuple[PassResult, ...]]:
    """Run source transforms over a copy of the module tree; the caller's module is left as it was."""
    results = []
    for one in passes:
        report(one.name)
        own = model.with_own_modules()
        before = _module_text(own)
        log, started = MatchLog(), time.perf_counter()
        model = _guarded(one, lambda own=own, one=one, log=log: one.transform(own, log))  # type: ignore[misc]
        results.append(_result(one, log, started, changed=_module_text(model) != before))
    return model, tuple(results)


def run_program(
    program: Program, passes: Iterable[GraphPass | ProgramPass], report: Report = lambda name: None
) -> tuple[Program, tuple[PassResult, ...]]:
    """Run graph and program passes, verifying the program after each."""
    results = []
    for one in passes:
        report(one.name)
        log, started = MatchLog(), time.perf_counter()
        run = _run_graph_pass if isinstance(one, GraphPass) else _run_program_pass
        rewritten = _guarded(one, lambda run=run, one=one, program=program, log=log: run(one, program, log))  # type: ignore[misc]
        changed = rewritten is not program
        if changed:
            _verify_after(one, rewritten)
        results.append(_result(one, log, started, changed=changed))
        program = rewritten
    return program, tuple(results)


def _run_graph_pass(one: GraphPass, program: Program, log: MatchLog) -> Program:
    for name, method in program.methods.items():
        editor = GraphEditor(method.exported)
        local = MatchLog()
        one.rewrite(editor, method, local)
        log.matches += [f"{name}: {where}" for where in local.matches]
        log.refusals += [Refusal(f"{name}: {refusal.where}", refusal.reason) for refusal in local.refusals]
        if not local.matches:
            continue
        rewritten = program.with_exported(name, editor.finish())
        if method_text(name, rewritten.methods[name]) != method_text(name, method):
            program = rewritten
    return program


def _run_program_pass(one: ProgramPass, program: Program, log: MatchLog) -> Program:
    rewritten = one.rewrite(program, log)
    return program if program_text(rewritten) == program_text(program) else rewritten


def _guarded(one: Pass, run: Callable[[], T]) -> T:
    try:
        return run()
    except TriptychError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise VerificationError(
            f"pass {one.name} failed with {type(error).__name__}: {reason}; pass developer: see the chained error"
        ) from error


def _verify_after(one: Pass, program: Program) -> None:
    try:
        verify(program)
    except VerificationError as error:
        raise VerificationError(f"pass {one.name} broke the program: {error}; pass developer: mend the pass") from error


def _result(one: Pass, log: MatchLog, started: float, *, changed: bool) -> PassResult:
    if not log.matches and not one.may_match_nothing:
        looked_at = "; ".join(map(str, log.refusals[:3])) or "it found no candidate"
        raise PipelineError(f"pass {one.name} matched nothing: {looked_at}; leave it out of the pipeline")
    if log.matches and not changed:
        raise VerificationError(
            f"pass {one.name} reports {len(log.matches)} matches and changed nothing; "
            "pass developer: report a match only where you rewrote"
        )
    return PassResult(
        one.name, tuple(log.matches), tuple(log.refusals), changed, round(time.perf_counter() - started, 4)
    )


def _module_text(model: Model) -> str:
    tensors = [
        f"{name} {type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)} {id(tensor)}"
        for name, tensor in [*model.module.named_parameters(), *model.module.named_buffers()]
    ]
    return "\n".join([repr(model.module), *tensors, str(model.metadata), str([e.name for e in model.entry_points])])
