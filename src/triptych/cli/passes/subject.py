"""What the commands on passes work on: a model from a folder, or the embedded one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from triptych.compiler.model import Model
    from triptych.compiler.oracle import Oracle

Command = TypeVar("Command", bound=Callable[..., Any])


def model_options(command: Command) -> Command:
    """Add ``--model`` and ``--max-context`` to a command."""
    command = click.option(
        "--max-context", type=click.IntRange(min=1), default=128, show_default=True, help="Positions to build for."
    )(command)
    return click.option(
        "--model",
        "model_path",
        type=click.Path(path_type=Path),
        default=None,
        help="A local Hugging Face checkpoint; default: the embedded vision-language model.",
    )(command)


def load_model(path: Path | None, max_context: int) -> Model:
    """Return the model the user named; raises `ModelError`."""
    if path is None:
        from triptych.testing import default_model

        return default_model(max_context)
    from triptych.compiler.adapters.hugging_face import load

    return load(path, max_context=max_context)


@contextmanager
def model_folder(path: Path | None) -> Iterator[Path]:
    """Give the folder of the model the user named, the embedded one's where none is."""
    if path is not None:
        yield path
        return
    from importlib.resources import as_file, files

    with as_file(files("triptych.demo").joinpath("model")) as folder:
        yield folder


def load_oracle(model: Model, tokens: int) -> Oracle:
    """Return the oracle of `model` over conversations that decode `tokens` positions after each prompt."""
    from triptych.compiler.oracle import Oracle
    from triptych.compiler.trace_plans import make_plans, subject_of

    return Oracle(model, make_plans(subject_of(model), tokens, (1, 17)))
