"""Reproducers: a guilty pass with all it takes to see it fail, in a folder that runs by itself.

::

    pipeline.txt         the whole pipeline, the guilty step marked
    program/             the program before the pass (`triptych.compiler.storage`), where there was one already
    METHOD.pt2           its guilty method as `torch.export.save` writes it, to be looked at with torch alone
    trace.json           the shortest conversation that fails, and how far a result may be off
    trace.safetensors    its tokens and pictures, and what the model itself gives for them
    guilty_pass.py       a copy of the source file of the pass, to be mended
    reproduce.py         runs the pass, plays the conversation, exits with 1 until the pass is mended

The script unpickles nothing. `minimize` first looks for fewer layers and a shorter conversation that still fail.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from triptych.compiler import manager, storage
from triptych.compiler.bisect import Culprit, Report, Stage, apply_step, bisect, steps_of
from triptych.compiler.custom_operators import custom_operators
from triptych.compiler.failing_case import PROGRAM_FOLDER, Case
from triptych.compiler.folders import check_replaceable, folder_beside
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle, unseen, wider
from triptych.compiler.pass_kinds import Pass, Tolerance
from triptych.compiler.pipeline import CAPTURE, Pipeline, as_pipeline, format_pass
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ModelRunner
from triptych.compiler.properties import QUANTIZED
from triptych.compiler.shrinking import LAYERS, beginning, cut_stacks, in_few_steps, plan_of, stacks
from triptych.compiler.trace_plans import TracePlan
from triptych.errors import PipelineError, TriptychError, UsageError, VerificationError

SCRIPT: Final = "reproduce.py"
PASS_MODULE: Final = "guilty_pass"
PIPELINE_FILE: Final = "pipeline.txt"


def write_reproducer(
    culprit: Culprit, oracle: Oracle, folder: Path, pipeline: Pipeline, *, model_path: Path | None = None
) -> Path:
    """Write the folder described above for what `bisect` found in `pipeline`, and return the path of its script.

    A source transform, or the capture, works on a model, which has no form of its own on disk: the script starts
    from the checkpoint in `model_path`. The script is run once before the folder appears, and must fail.

    Raises:
        ArtifactError: `folder` holds something that is no reproducer.
        UsageError: `model_path` is missing, or a pass cannot be made again from a file.
        VerificationError: what was written does not fail.
    """
    folder = folder.resolve()
    check_replaceable(folder, SCRIPT, "reproducer")
    source = None if culprit.guilty is None else _Source.of(culprit.guilty)
    script = _script(culprit, source, _start(culprit, oracle, pipeline, model_path))
    case = _shortest_case(culprit, oracle, pipeline)
    with folder_beside(folder) as fresh:
        (fresh / SCRIPT).write_text(script, encoding="utf-8")
        (fresh / PIPELINE_FILE).write_text(_marked(culprit, pipeline), encoding="utf-8")
        case.save(fresh)
        if source is not None:
            shutil.copyfile(source.file, fresh / f"{PASS_MODULE}.py")
        if isinstance(culprit.before, Program):
            storage.save(culprit.before, fresh / PROGRAM_FOLDER, locations=True)
            for name in culprit.before.methods if culprit.method is None else [culprit.method]:
                torch.export.save(culprit.before.methods[name].exported, fresh / f"{name}.pt2")
        _check_fails(fresh / SCRIPT)
    return folder / SCRIPT


# ---------------------------------------------------------------------------------------------------- what fails


def _shortest_case(culprit: Culprit, oracle: Oracle, pipeline: Pipeline) -> Case:
    """Return the shortest conversation that fails after the guilty part; the shortest of all where that part raises."""
    judged, declared = _judged_by(culprit, oracle, pipeline)
    after = _after(culprit)
    subject = culprit.before if after is None else after
    is_whole = isinstance(subject, Model) and not ModelRunner(subject).has_cache
    references = judged.whole_references if is_whole else judged.references
    operators = tuple(sorted(custom_operators(culprit.before))) if isinstance(culprit.before, Program) else ()
    cases = [
        Case(one.trace, one.wanted, wider(tolerance, declared), operators)
        for one, tolerance in zip(references, judged.tolerances, strict=True)
    ]
    cases.sort(key=lambda case: (len(case.trace.tokens), len(case.trace.steps)))
    for case in cases:
        if after is None or case.failures(lambda: after):
            return case
    raise UsageError(f"no conversation fails after {culprit.step}; give the oracle by which it was found guilty")


def _after(culprit: Culprit) -> Model | Program | None:
    """Apply the guilty part; None where it raises."""
    try:
        return apply_step(culprit.guilty, culprit.before, None if culprit.part is None else culprit.part.select)
    except TriptychError:
        return None


def _judged_by(culprit: Culprit, oracle: Oracle, pipeline: Pipeline) -> tuple[Oracle, Tolerance | None]:
    """Return the oracle and the declared tolerance that hold after the guilty step; quantizing moves the reference."""
    quantizing = [index for index, one in enumerate(pipeline.source[: culprit.index]) if QUANTIZED in one.ensures]
    if quantizing:
        model, _ = manager.run_source(oracle.model, pipeline.source[: quantizing[-1] + 1])
        oracle = oracle.of_quantized(model)
    declared: Tolerance | None = None
    for step in steps_of(pipeline)[: culprit.index + 1]:
        if step is not None and QUANTIZED not in step.ensures:
            declared = wider(step.tolerances["float32"], declared)
    return oracle, declared


# ---------------------------------------------------------------------------------------------------- the files


def _start(culprit: Culprit, oracle: Oracle, pipeline: Pipeline, model_path: Path | None) -> str:
    """Return the expression that gives what the guilty step is applied to."""
    if isinstance(culprit.before, Program):
        return "load_program(folder)"
    if model_path is None:
        raise UsageError(
            f"{culprit.step} works on the model itself, which a reproducer loads again; give the folder of its "
            "checkpoint as model_path"
        )
    passes = str(Pipeline(source=pipeline.source[: culprit.index]))
    try:
        as_pipeline(passes) if passes else None
    except PipelineError as error:
        raise UsageError(f"a script cannot make the passes before {culprit.step} again: {error}") from error
    layers = culprit.before.metadata.provenance.get(LAYERS)
    context = oracle.model.metadata.max_context
    return f"load_model({str(model_path.resolve())!r}, {passes!r}, max_context={context}, layers={layers})"


def _marked(culprit: Culprit, pipeline: Pipeline) -> str:
    """Return the pipeline, a step a line, with a mark at the guilty one."""
    names = [CAPTURE if step is None else format_pass(step) for step in steps_of(pipeline)]
    lines = [f"> {name}" if index == culprit.index else f"  {name}" for index, name in enumerate(names)]
    return "\n".join([*lines, "", f"guilty: {culprit}", ""])


@dataclass(frozen=True)
class _Source:
    """How a script makes a pass again: the file of its class, the name to import, and the call."""

    file: Path
    name: str
    call: str

    @classmethod
    def of(cls, one: Pass) -> _Source:
        """Raises `UsageError` for a class that cannot be imported and for an option that has no literal."""
        kind = type(one)
        if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
            where = "inside a function" if "<locals>" in kind.__qualname__ else "in the script that is running"
            raise UsageError(
                f"the class of pass {one.name} is defined {where}, from where no other script can import it; move it "
                "to the top level of a file of its own"
            )
        options = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        for option, value in options.items():
            if not _is_literal(value):
                raise UsageError(
                    f"option {option} of pass {one.name} is {value!r}, which a script cannot spell; use numbers, "
                    "texts, None, and tuples of them"
                )
        arguments = ", ".join(f"{option}={value!r}" for option, value in options.items())
        file = inspect.getsourcefile(kind)
        assert file is not None, "a class outside of __main__ comes from a file"
        return cls(Path(file), kind.__qualname__.partition(".")[0], f"{kind.__qualname__}({arguments})")


def _is_literal(value: object) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):
        return False


_SCRIPT_TEXT: Final = '''\
"""Shows what is wrong with {step}; exits with 1 as long as it is.

{culprit}
"""

import sys
from pathlib import Path

{imports}

folder = Path(__file__).resolve().parent
before = {start}
{guilty}
failures = Case.load(folder).failures(lambda: apply_step(guilty, before, {select}))
print("\\n".join(failures) or "nothing fails any more")
sys.exit(1 if failures else 0)
'''
_GUILTY_TEXT: Final = """
sys.dont_write_bytecode = True  # no compiled copy may hide an edit of the same second
from {module} import {name}

guilty = {call}"""


def _script(culprit: Culprit, source: _Source | None, start: str) -> str:
    part = culprit.part
    imports = [
        f"from triptych.compiler.bisect import {'apply_step' if part is None else 'Part, apply_step'}",
        f"from triptych.compiler.failing_case import Case, {start.partition('(')[0]}",
    ]
    guilty = _GUILTY_TEXT.format(module=PASS_MODULE, name=source.name, call=source.call) if source else "guilty = None"
    return _SCRIPT_TEXT.format(
        step=culprit.step if source is None else f"{PASS_MODULE}.py",
        culprit=str(culprit).replace("\\", "/").replace('"', "'"),
        imports="\n".join(imports),
        start=start,
        guilty=guilty,
        select=None if part is None else f"Part({part.method!r}, {part.limit}).select",
    )


def _check_fails(script: Path) -> None:
    """Run the script in a process of its own; raises `VerificationError` where it does not show a failure."""
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)  # noqa: S603
    # A script that breaks down exits with 1 as well, and has nothing to show.
    if done.returncode != 1 or not done.stdout.strip():
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise VerificationError(
            f"the reproducer does not show the failure when it is run: {reason}; pass developer: let the pass depend "
            "on its options and the program only, and its file import what it needs by absolute names"
        )


# ---------------------------------------------------------------------------------------------------- minimizing


def minimize(
    model: Model, pipeline: Pipeline, culprit: Culprit, oracle: Oracle, report: Report = lambda step: None
) -> tuple[Model, Culprit, Oracle]:
    """Return a smaller model, what is guilty on it, and an oracle with one short conversation that shows it.

    Of every stack of blocks 1, 2, 4 … are kept, as few as leave the same step guilty; the reference is the cut
    model's own eager form. Then the beginning of a failing conversation, in few steps, as short as still fails.
    `culprit` is what `bisect` found for `pipeline` run on `model`; all three come back as they are where nothing
    smaller fails.
    """
    layers, longest = 1, max((len(stack) for stack in stacks(model).values()), default=0)
    while layers < longest:
        report(f"search on {layers} of {longest} layers")
        cut = cut_stacks(model, layers)
        found = _again(cut, pipeline, Oracle(cut, oracle.plans, recipe=oracle.recipe), culprit)
        if found is not None:
            model, (culprit, oracle) = cut, found
            break
        layers *= 2
    report("search for the shortest conversation")
    found = _again(model, pipeline, oracle.over([_shortest_plan(culprit, oracle, pipeline)]), culprit)
    return (model, culprit, oracle) if found is None else (model, *found)


def _again(model: Model, pipeline: Pipeline, oracle: Oracle, culprit: Culprit) -> tuple[Culprit, Oracle] | None:
    """Search again on the conversations that `model` reacts to, and return what is guilty, and the oracle of these.

    None where another step is guilty, or none, or in another way (a cut may leave a pass without its match), or the
    model does not run.
    """
    try:
        pairs = zip(oracle.plans, oracle.references, strict=True)
        visible = oracle.over([plan for plan, one in pairs if not any(unseen(one.seen))])
        found = bisect(model, pipeline, visible) if visible.plans else None
    except Exception:  # noqa: BLE001 (a model cut short may fail in any way; it is then left as it was)
        return None
    is_same = found is not None and _kind(found) == _kind(culprit)
    return (found, visible) if found is not None and is_same else None


def _kind(culprit: Culprit) -> tuple[object, ...]:
    return culprit.step, culprit.index, culprit.method, culprit.match is None


def _shortest_plan(culprit: Culprit, oracle: Oracle, pipeline: Pipeline) -> TracePlan:
    base = _shortest_case(culprit, oracle, pipeline).trace
    judged, declared = _judged_by(culprit, oracle, pipeline)
    after = _after(culprit)

    def failing(length: int) -> TracePlan | None:
        begun = beginning(base, length)
        for candidate in [] if begun is None else in_few_steps(begun):
            tried = judged.over([plan_of(candidate)])
            is_blind = any(unseen(tried.references[0].seen))
            if not is_blind and (after is None or Stage(after, tried, declared).problem() is not None):
                return tried.plans[0]
        return None

    good, length = 0, 1
    best = failing(length)
    while best is None and length < len(base.tokens):
        good, length = length, min(2 * length, len(base.tokens))
        best = failing(length)
    if best is None:
        return plan_of(base)
    while length - good > 1:
        middle = (good + length) // 2
        found = failing(middle)
        good, length, best = (middle, length, best) if found is None else (good, middle, found)
    return best
