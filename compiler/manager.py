"""The pass manager: runs passes and holds every one to its contract.

After each pass it rebuilds the program, finds out by itself whether anything changed, and verifies what did.
A pass that matched nothing, changed what it was given, or broke the program fails the pipeline by name, and the
message says who must do what. Everything else that is known of a run comes from instruments.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from torch import Tensor

from triptych.compiler.budget import BudgetError, find_culprit
from triptych.compiler.capture import capture
from triptych.compiler.derived_weights import DerivedWeights
from triptych.compiler.editing import GraphEditor
from triptych.compiler.fingerprint import fingerprint
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import GraphPass, Match, MatchLog, Pass, ProgramPass, Refusal, SourceTransform
from triptych.compiler.program import Program
from triptych.compiler.provenance import layer_in, layer_of
from triptych.compiler.verifier import verify
from triptych.errors import PipelineError, TriptychError, VerificationError


@dataclass(frozen=True)
class PassResult:
    """What one pass did: places matched and refused, whether anything changed, and seconds spent.

    `seconds` is the pass's own time, `check_seconds` what holding it to its contract took beside.
    """

    name: str
    matches: tuple[Match, ...]
    refusals: tuple[Refusal, ...]
    changed: bool
    seconds: float
    check_seconds: float = 0.0


class Instrument:
    """Watches passes run; the base class watches nothing.

    `before` and `after` get the model around a source transform, the program around any other pass. An
    instrument that finds something wrong raises `VerificationError`.
    """

    def before(self, one: Pass, subject: Model | Program) -> None:
        """Called before `one` runs on `subject`."""

    def after(self, one: Pass, before: Model | Program, after: Model | Program, result: PassResult) -> None:
        """Called after `one` turned `before` into `after`; both are the same object where nothing changed."""


T = TypeVar("T")
Report = Callable[[str], None]
Select = Callable[[str, int], bool]
"""(method, running number of a match in it) → may it be rewritten? Source and program passes have method ""."""


def run_source(
    model: Model,
    passes: Iterable[SourceTransform],
    report: Report = lambda name: None,
    instruments: Sequence[Instrument] = (),
    select: Select | None = None,
) -> tuple[Model, tuple[PassResult, ...]]:
    """Run source transforms over a copy of the module tree; the caller's module is left as it was.

    With `select` passes rewrite a part of their matches only, and are not held to what they promise of the whole.
    """
    results = []
    for one in passes:
        report(one.name)
        for instrument in instruments:
            instrument.before(one, model)
        own = model.with_own_modules()
        before, versions = _module_text(own), _versions(_tensors(model))
        log, started = _log("", select), time.perf_counter()
        transformed = _guarded(one, partial(one.transform, own, log))
        seconds = time.perf_counter() - started
        _check_tensors(one, _tensors(model), versions)
        result = _result(one, [log], changed=_module_text(transformed) != before, seconds=seconds, started=started)
        if one.uniform and select is None:
            _check_uniform(one, _layers_of_modules(transformed), {"the model": Counter(_layers(log.matches))})
        for instrument in instruments:
            instrument.after(one, model, transformed, result)
        results.append(result)
        model = transformed
    return model, tuple(results)


def run_capture(model: Model, passes: Iterable[SourceTransform], report: Report = lambda name: None) -> Program:
    """Capture `model` and hold it to what `passes`, which made it what it is, ensure of the program."""
    program = capture(model, report)
    verify(program)
    for one in passes:
        check_ensured(one, program)
    return program


def run_program(
    program: Program,
    passes: Iterable[GraphPass | ProgramPass],
    report: Report = lambda name: None,
    instruments: Sequence[Instrument] = (),
    select: Select | None = None,
) -> tuple[Program, tuple[PassResult, ...]]:
    """Run graph and program passes, verifying what each changed; `select` as in `run_source`."""
    results = []
    history = [("the program given", program)]
    for one in passes:
        report(one.name)
        for instrument in instruments:
            instrument.before(one, program)
        try:
            rewritten, result = _run_one(one, program, select)
        except BudgetError as error:
            raise BudgetError(f"{error}; {find_culprit(error.budget, history)}", error.budget) from None
        history.append((one.name, rewritten))
        for instrument in instruments:
            instrument.after(one, program, rewritten, result)
        results.append(result)
        program = rewritten
    return program, tuple(results)


def _run_one(one: GraphPass | ProgramPass, program: Program, select: Select | None) -> tuple[Program, PassResult]:
    began = time.perf_counter()
    _check_required(one, program)
    prints, versions = _fingerprints(program), _versions(_tensors(program))
    started = time.perf_counter()
    if isinstance(one, GraphPass):
        rewritten, logs = _guarded(one, partial(_run_graph_pass, one, program, select))
    else:
        log = _log("", select)
        rewritten, logs = _guarded(one, partial(_run_program_pass, one, program, log)), [log]
    seconds = time.perf_counter() - started
    if _fingerprints(program) != prints:
        raise VerificationError(
            f"pass {one.name} changed the program it was given; pass developer: build a new one, and edit graphs "
            "through a GraphEditor"
        )
    _check_tensors(one, _tensors(program), versions)
    changed = rewritten is not program and (
        _fingerprints(rewritten) != prints or _surface(rewritten) != _surface(program)
    )
    if not changed:
        rewritten = program
    result = _result(one, logs, changed=changed, seconds=seconds, started=began)
    if changed:
        _verify_after(one, rewritten, program)
    if select is None:
        check_ensured(one, rewritten)
        if one.uniform:
            _check_uniform_methods(one, program, logs)
    return rewritten, dataclasses.replace(result, check_seconds=time.perf_counter() - began - seconds)


def _run_graph_pass(one: GraphPass, program: Program, select: Select | None) -> tuple[Program, list[MatchLog]]:
    logs, exported, derived = [], {}, DerivedWeights(program.state)
    for name, method in program.methods.items():
        log = _log(name, select)
        editor = GraphEditor(method.exported, one.name, derived)
        one.rewrite(editor, method, log)
        logs.append(log)
        if log.matches:
            exported[name] = editor.finish()
        elif editor.changed:
            raise VerificationError(
                f"pass {one.name} changed the graph of {name} and reported no match there; pass developer: ask "
                "log.match(node) before rewriting, and leave the place alone where it returns False",
                method=name,
            )
    with _named(one):
        return (program.with_exported(exported) if exported else program), logs


def _run_program_pass(one: ProgramPass, program: Program, log: MatchLog) -> Program:
    with _named(one):
        return one.rewrite(program, log)


def _log(method: str, select: Select | None) -> MatchLog:
    return MatchLog(method or None) if select is None else MatchLog(method or None, partial(select, method))


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


def _check_required(one: Pass, program: Program) -> None:
    for required in one.requires:
        reason = required.violation(program) if required.violation else None
        if reason is not None:
            raise PipelineError(
                f"pass {one.name} requires {required}, and {reason}; put a pass that ensures {required} before it"
            )


def check_ensured(one: Pass, program: Program) -> None:
    """Raise `VerificationError` where `program` lacks a property that `one`, which made it, ensures."""
    for ensured in one.ensures:
        reason = ensured.violation(program) if ensured.violation else None
        if reason is not None:
            raise VerificationError(
                f"pass {one.name} ensures {ensured}, and after it {reason}; pass developer: mend the pass, or do not "
                "declare what it cannot ensure"
            )


def _verify_after(one: Pass, program: Program, before: Program) -> None:
    with _named(one):
        verify(program, before)


@contextmanager
def _named(one: Pass) -> Iterator[None]:
    """Say of a program that cannot be put together, or is not well formed, which pass made it."""
    try:
        yield
    except VerificationError as error:
        raise VerificationError(
            f"pass {one.name} broke the program: {error}; pass developer: mend the pass",
            method=error.method,
            place=error.place,
        ) from error


def _result(one: Pass, logs: Sequence[MatchLog], *, changed: bool, seconds: float, started: float) -> PassResult:
    matches = tuple(match for log in logs for match in log.matches)
    refusals = tuple(refusal for log in logs for refusal in log.refusals)
    held_back = any(log.asked > len(log.matches) for log in logs)
    if not matches and not one.may_match_nothing and not held_back:
        looked_at = "; ".join(map(str, refusals[:3])) or "it found no candidate"
        raise PipelineError(f"pass {one.name} matched nothing: {looked_at}; leave it out of the pipeline")
    if matches and not changed:
        raise VerificationError(
            f"pass {one.name} reports {len(matches)} matches and changed nothing; "
            "pass developer: report a match only where you rewrite"
        )
    checking = time.perf_counter() - started - seconds
    return PassResult(one.name, matches, refusals, changed, seconds, checking)


# ---------------------------------------------------------------------------------------------------- immutability


def _fingerprints(program: Program) -> dict[str, int]:
    return {name: fingerprint(method.exported) for name, method in program.methods.items()}


def _surface(program: Program) -> object:
    return program.metadata, {
        name: (method.roles, method.inputs, method.outputs) for name, method in program.methods.items()
    }


def _tensors(subject: Model | Program) -> dict[str, Tensor]:
    if isinstance(subject, Model):
        return {**dict(subject.module.named_parameters()), **dict(subject.module.named_buffers())}
    rows = {row.name: row.initial for row in subject.state.values()}
    return {**rows, **{weight.key: weight.uses[0].tensor for weight in subject.weights.values()}}


def _versions(tensors: dict[str, Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors.values()]


def _check_tensors(one: Pass, tensors: dict[str, Tensor], versions: list[int]) -> None:
    for (name, tensor), version in zip(tensors.items(), versions, strict=True):
        if tensor._version != version:
            raise VerificationError(
                f"pass {one.name} changed the values of {name} in place, which others share; pass developer: put a "
                "new tensor in its place"
            )


def _module_text(model: Model) -> str:
    tensors = [
        f"{name} {type(tensor).__name__} {tensor.dtype} {tuple(tensor.shape)} {id(tensor)}"
        for name, tensor in _tensors(model).items()
    ]
    return "\n".join([repr(model.module), *tensors, str(model.metadata), str([e.name for e in model.entry_points])])


# ---------------------------------------------------------------------------------------------------- uniformity


def _layers(matches: Iterable[Match]) -> Iterator[str]:
    return (match.layer for match in matches if match.layer is not None)


def _layers_of_modules(model: Model) -> dict[str, set[str]]:
    layers = {layer for name, _ in model.module.named_modules() if (layer := layer_in(name)) is not None}
    return {"the model": layers}


def _check_uniform_methods(one: Pass, program: Program, logs: Sequence[MatchLog]) -> None:
    layers = {
        name: {layer for node in method.exported.graph.nodes if (layer := layer_of(node)) is not None}
        for name, method in program.methods.items()
    }
    counts = {log.method: Counter(_layers(log.matches)) for log in logs if log.method is not None}
    _check_uniform(one, layers, counts)


def _check_uniform(one: Pass, layers: dict[str, set[str]], counts: dict[str, Counter[str]]) -> None:
    """Every layer of a stack has as many matches as its first, in every method that runs the stack."""
    expected: dict[str, tuple[str, int]] = {}
    stacks = {layer.rpartition(".")[0] for counter in counts.values() for layer in counter}
    for method, counter in counts.items():
        for layer in sorted(layers[method]):
            stack = layer.rpartition(".")[0]
            if stack not in stacks:
                continue
            place, count = expected.setdefault(stack, (f"{layer} in {method}", counter[layer]))
            if counter[layer] != count:
                raise VerificationError(
                    f"pass {one.name} is uniform over layers and matched {count} times {place}, {counter[layer]} times "
                    f"{layer} in {method}; pass developer: find out with `triptych passes explain` why, or declare "
                    "uniform = False",
                    method=method,
                    place=layer,
                )
