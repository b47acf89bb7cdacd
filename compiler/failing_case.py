"""A failing conversation on disk, and what a guilty step is applied to: what the script of a reproducer loads.

::

    trace.json           the steps of the conversation, how far a result may be off, the custom operators needed
    trace.safetensors    its tokens and pictures, and what the model itself gives for them
    program/             the program before the pass (`triptych.compiler.storage`)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.compiler import manager, storage
from triptych.compiler.custom_operators import MissingOperatorError, require_operator
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import Tolerance
from triptych.compiler.pipeline import as_pipeline
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ModelRunner, ProgramRunner
from triptych.compiler.shrinking import cut_stacks
from triptych.compiler.trace import CallTrace, Step, TraceOutputs, compare, replay
from triptych.errors import TriptychError, UsageError
from triptych.manifest import token_ids

TRACE_FILE: Final = "trace.json"
TENSORS_FILE: Final = "trace.safetensors"
PROGRAM_FOLDER: Final = "program"


@dataclass(frozen=True)
class Case:
    """A conversation, what the model itself gives for it, and how far a result may be off.

    `operators` are the custom operators that the program to play it on calls.
    """

    trace: CallTrace
    wanted: TraceOutputs
    tolerance: Tolerance
    operators: tuple[str, ...] = ()

    def failures(self, make: Callable[[], Model | Program]) -> tuple[str, ...]:
        """Play the conversation on what `make` returns and say what is wrong; an error it raises is wrong too."""
        try:
            subject = make()
            runner = ProgramRunner(subject) if isinstance(subject, Program) else ModelRunner(subject)
            got = replay(runner, self.trace, runner.methods)
        except TriptychError as error:
            return (str(error),)
        text = subject.metadata.kept_tokens
        kept = None if text is None else torch.tensor(token_ids(text))
        return compare(self.trace, self.wanted, got, self.tolerance, kept).failures(self.tolerance)

    def save(self, folder: Path) -> None:
        """Write the case into `folder`, which is there."""
        tensors = {"tokens": self.trace.tokens}
        tensors |= {f"pixel_values {index}": pixels for index, pixels in enumerate(self.trace.pixel_values)}
        tensors |= {f"output {label}": value for label, value in self.wanted.outputs.items()}
        tensors |= {f"state {name}": value for name, value in self.wanted.state.items()}
        save_file({name: _own(value) for name, value in tensors.items()}, folder / TENSORS_FILE)
        data = {
            "name": self.trace.name,
            "steps": [dataclasses.asdict(step) for step in self.trace.steps],
            "pictures": len(self.trace.pixel_values),
            "image_token_id": self.trace.image_token_id,
            "outputs": list(self.wanted.outputs),
            "state": list(self.wanted.state),
            "tolerance": dataclasses.asdict(self.tolerance),
            "operators": list(self.operators),
        }
        (folder / TRACE_FILE).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Case:
        """Read the case in `folder`."""
        data = json.loads((folder / TRACE_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS_FILE)
        trace = CallTrace(
            data["name"],
            tensors["tokens"],
            tuple(Step(**step) for step in data["steps"]),
            tuple(tensors[f"pixel_values {index}"] for index in range(data["pictures"])),
            data["image_token_id"],
        )
        wanted = TraceOutputs(
            {label: tensors[f"output {label}"] for label in data["outputs"]},
            {name: tensors[f"state {name}"] for name in data["state"]},
        )
        return cls(trace, wanted, Tolerance(**data["tolerance"]), tuple(data["operators"]))


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def load_program(folder: Path) -> Program:
    """Read the program beside the case in `folder`; raises `UsageError` where an operator it calls is missing."""
    try:
        for operator in Case.load(folder).operators:
            require_operator(operator)
    except MissingOperatorError as error:
        raise UsageError(f"{folder} cannot be run here: {error}") from error
    return storage.load(folder / PROGRAM_FOLDER)


def load_model(checkpoint: str, passes: str, *, max_context: int, layers: int | None) -> Model:
    """Read a checkpoint, cut its stacks to so many layers where that is given, and run source transforms on it."""
    from triptych.compiler.adapters.hugging_face import load

    model = load(Path(checkpoint), max_context=max_context)
    cut = model if layers is None else cut_stacks(model, layers)
    transformed, _ = manager.run_source(cut, as_pipeline(passes).source if passes else ())
    return transformed
