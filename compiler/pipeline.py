"""Pipelines as text: ``static-kv-cache{max=2048},swap-sdpa,capture,last-token-logits``.

A pipeline is a sequence of passes; ``capture`` stands between source transforms and the rest. The text and
the sequence are two forms of one thing: `parse` reads what `str` prints.

Options are the fields of a pass, written ``option=value``: `int`, `float`, `bool` (``true``, ``false``), `str`, a
`Literal`, or one of these or None, which is not written. The elements of a field ``tuple[X, ...]``, where X has a
classmethod `parse` that raises `UsageError`, are written bare: ``assert-cost{decode.bytes<=60MB,prefill.flops<=2G}``.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, Self, runtime_checkable

from triptych.compiler.pass_kinds import GraphPass, Pass, ProgramPass, SourceTransform
from triptych.compiler.properties import Property
from triptych.compiler.registry import find_pass
from triptych.errors import PipelineError, UsageError

CAPTURE: Final = "capture"
_STEP: Final = re.compile(r"\s*(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)\s*(?P<options>\{[^{}]*\})?\s*")
_OPTION: Final = re.compile(r"\s*(?P<key>[a-z_][a-z0-9_]*)\s*=\s*(?P<value>[^,\s{}]+)\s*")


@dataclass(frozen=True)
class Pipeline:
    """Passes before capture, whether capture stands in the pipeline, and passes after it.

    It may be a part of a longer one, so it is `checked` where it is whole.
    """

    source: tuple[SourceTransform, ...] = ()
    captures: bool = False
    program: tuple[GraphPass | ProgramPass, ...] = ()

    def checked(self) -> Pipeline:
        """Return the pipeline itself; raises `PipelineError` for an order that the passes' declarations forbid."""
        _check_order(self.passes)
        return self

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes in order."""
        return (*self.source, *self.program)

    def __add__(self, other: Pipeline) -> Pipeline:
        if self.captures and other.captures:
            raise PipelineError(f"'{self},{other}' captures twice; one 'capture' is enough")
        if self.captures and other.source:
            raise PipelineError(f"{other.source[0].name} changes the module: put it before 'capture'")
        return Pipeline(self.source + other.source, self.captures or other.captures, self.program + other.program)

    def __str__(self) -> str:
        steps = [format_pass(one) for one in self.source]
        steps += [CAPTURE] if self.captures else []
        return ",".join(steps + [format_pass(one) for one in self.program])


PipelineLike = str | Pipeline | Pass | Sequence[Pass]
"""What stands for a pipeline in the public functions: its text, a `Pipeline`, a pass, or passes in order."""


def as_pipeline(pipeline: PipelineLike) -> Pipeline:
    """Return `pipeline`, which may be a part of a longer one, as a `Pipeline`; its order is not checked.

    Raises `PipelineError` for a text that cannot be read.
    """
    if isinstance(pipeline, Pipeline):
        return pipeline
    if isinstance(pipeline, str):
        return _read(pipeline)
    return build([pipeline] if isinstance(pipeline, Pass) else pipeline)


def parse(text: str) -> Pipeline:
    """Parse a pipeline text, find its passes and check their order.

    Raises `PipelineError` with the position of what it cannot read, an unknown pass or option, a wrong value,
    or passes in an order that their declarations forbid.
    """
    return _read(text).checked()


def _read(text: str) -> Pipeline:
    steps: list[Pass | None] = []
    position = 0
    while position < len(text) or position == 0:
        match = _STEP.match(text, position)
        if match is None:
            raise _error(text, position, "expected a pass name such as swap-sdpa")
        steps.append(_step(text, match))
        position = match.end()
        if position == len(text):
            break
        if text[position] != ",":
            raise _error(text, position, f"expected ',' between passes, found {text[position]!r}")
        position += 1
        if position == len(text):
            raise _error(text, position, "expected a pass name after the last ','")
    return build(steps, text)


def build(steps: Sequence[Pass | None], text: str = "") -> Pipeline:
    """Make a pipeline of passes, None standing for capture; raises `PipelineError` on an impossible order."""
    if steps.count(None) > 1:
        raise PipelineError(f"pipeline {text!r} captures {steps.count(None)} times; one 'capture' is enough")
    cut = steps.index(None) if None in steps else None
    before = [one for one in steps[:cut] if one is not None]
    after = [one for one in steps[cut + 1 :] if one is not None] if cut is not None else []
    if cut is None and not all(isinstance(one, SourceTransform) for one in before):
        before, after = [], before
    source, program = [], []
    for one in before:
        if not isinstance(one, SourceTransform):
            raise PipelineError(f"{one.name} rewrites a captured program: put it after 'capture'")
        source.append(one)
    for one in after:
        if not isinstance(one, (GraphPass, ProgramPass)):
            raise PipelineError(f"{one.name} changes the module: put it before 'capture'")
        program.append(one)
    return Pipeline(tuple(source), cut is not None, tuple(program))


def _check_order(passes: Sequence[Pass]) -> None:
    names = [one.name for one in passes]
    ensured: set[Property] = set()
    for index, one in enumerate(passes):
        for other in names[index + 1 :]:
            if other in one.after:
                raise PipelineError(f"{one.name} must come after {other}, and stands before it; swap them")
        for other in names[:index]:
            if other in one.before:
                raise PipelineError(f"{one.name} must come before {other}, and stands after it; swap them")
        missing = one.requires - ensured
        if missing:
            raise PipelineError(
                f"{one.name} requires {', '.join(sorted(map(str, missing)))}, which no earlier pass of the pipeline "
                "ensures; put one that does before it"
            )
        ensured |= one.ensures


def _step(text: str, match: re.Match[str]) -> Pass | None:
    name = match["name"]
    if name == CAPTURE:
        if match["options"]:
            raise _error(text, match.start("options"), "'capture' has no options")
        return None
    pass_class = find_pass(name)
    values = _options(text, match, pass_class)
    for field in dataclasses.fields(pass_class):
        if field.name not in values and field.default is dataclasses.MISSING:
            form = "…" if _item_class(_kinds(pass_class)[field.name]) else f"{field.name}=…"
            raise _error(text, match.start("name"), f"{name} needs the option {field.name}: {name}{{{form}}}")
    return pass_class(**values)


# ---------------------------------------------------------------------------------------------------- options


@runtime_checkable
class _Item(Protocol):
    """The class of the elements of an option that is written bare: `parse` reads what `str` prints."""

    @classmethod
    def parse(cls, text: str) -> Self: ...


def _kinds(pass_class: type[Pass]) -> dict[str, Any]:
    """Return the types of the options by name."""
    fields = dataclasses.fields(pass_class)
    # Where there are no options, annotations that only a type checker can resolve do no harm.
    hints = typing.get_type_hints(pass_class) if fields else {}
    return {field.name: hints[field.name] for field in fields}


def _item_class(kind: Any) -> type[_Item] | None:
    """Return the class X of an option of type ``tuple[X, ...]`` whose elements are written bare, or None."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and len(arguments) == 2 and isinstance(arguments[0], _Item):
        return typing.cast("type[_Item]", arguments[0])
    return None


def _options(text: str, match: re.Match[str], pass_class: type[Pass]) -> dict[str, Any]:
    """Read the options of one step; what is not ``option=value`` is an element of the pass's bare option."""
    kinds = _kinds(pass_class)
    bare, item = next(((key, found) for key, kind in kinds.items() if (found := _item_class(kind))), ("", None))
    values: dict[str, Any] = {}
    for part in _split(match["options"] or "{}", match.start("options")):
        option = _OPTION.fullmatch(part.text)
        if option is not None:
            key = option["key"]
            if key in values:
                raise _error(text, part.position, f"option {key!r} is given twice")
            values[key] = _value(text, part.position, pass_class, key, option["value"])
        elif item is not None and part.text:
            try:
                values[bare] = (*values.get(bare, ()), item.parse(part.text))
            except UsageError as error:
                raise _error(text, part.position, str(error)) from error
        else:
            raise _error(text, part.position, f"expected option=value, found {part.text!r}")
    return values


@dataclass(frozen=True)
class _Part:
    text: str
    position: int


def _split(options: str, position: int) -> Iterator[_Part]:
    """Yield what stands between the commas of ``{…}``, without white space around it, and where it stands."""
    body, position = options[1:-1], position + 1
    for part in body.split(",") if body.strip() else []:
        yield _Part(part.strip(), position + len(part) - len(part.lstrip()))
        position += len(part) + 1


def _value(text: str, position: int, pass_class: type[Pass], key: str, written: str) -> object:
    kinds = _kinds(pass_class)
    if key not in kinds:
        known = ", ".join(sorted(kinds)) or "none"
        raise _error(text, position, f"{pass_class.name} has no option {key!r}; its options: {known}")
    kind = kinds[key]
    if _item_class(kind):
        raise _error(text, position, f"the {key} of {pass_class.name} are written without '{key}='")
    allowed = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    choices = [choice for one in allowed if typing.get_origin(one) is Literal for choice in typing.get_args(one)]
    choices += [True, False] if bool in allowed else []
    for choice in choices:
        if written == _printed(choice):
            return choice
    for number in (int, float):
        if number in allowed:
            try:
                return number(written)
            except ValueError:
                continue
    if str in allowed:
        return written
    spelled_out = (bool, types.NoneType)
    names = [one.__name__ for one in allowed if typing.get_origin(one) is not Literal and one not in spelled_out]
    expected = " or ".join([*map(_printed, choices), *names])
    raise _error(text, position, f"option {key!r} of {pass_class.name} is {written!r}; expected {expected}")


def format_pass(one: Pass) -> str:
    """Print a pass with the options that differ from their defaults, so that `parse` reads the same pass.

    Raises `PipelineError` for an option that no text gives back, such as one with a comma in it.
    """
    options = [
        _option_text(one, field.name) for field in dataclasses.fields(one) if getattr(one, field.name) != field.default
    ]
    return f"{one.name}{{{','.join(options)}}}" if options else one.name


def _option_text(one: Pass, name: str) -> str:
    value = getattr(one, name)
    is_bare = _item_class(_kinds(type(one))[name]) is not None
    option = ",".join(map(str, value)) if is_bare else f"{name}={_printed(value)}"
    text = f"{one.name}{{{option}}}"
    match = _STEP.fullmatch(text)
    try:
        read = None if match is None else _options(text, match, type(one)).get(name)
    except PipelineError:
        read = None
    if read is None or read != value:
        raise PipelineError(
            f"option {name!r} of {one.name} is {value!r}, which no pipeline text gives back; choose a value of its "
            "type that is not empty and has no comma, brace or white space"
        )
    return option


def _printed(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _error(text: str, position: int, message: str) -> PipelineError:
    return PipelineError(f"pipeline {text!r}, column {position + 1}: {message}")
