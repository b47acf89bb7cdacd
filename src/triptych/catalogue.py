"""What is known of a pass from its class: kind, options, promises. Pages of documentation are made from it."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from triptych.compiler.pass_kinds import GraphPass, Pass, ProgramPass, SourceTransform
from triptych.compiler.registry import PASS_GROUP, owner, plugins

KINDS: Final[Mapping[type[Pass], tuple[str, str]]] = {
    SourceTransform: ("source", "changes the module, before capture"),
    GraphPass: ("graph", "changes one method at a time, after capture"),
    ProgramPass: ("program", "changes the program as a whole, after capture"),
}


@dataclass(frozen=True)
class Option:
    """One field of a pass: its name in pipeline texts, its type as written, and its default (None: it is required)."""

    name: str
    kind: str
    default: str | None


@dataclass(frozen=True)
class PassInfo:
    """A pass as its author declares it."""

    name: str
    kind: str
    when: str
    summary: str
    description: str
    options: tuple[Option, ...]
    promises: tuple[tuple[str, str], ...]
    origin: str


def pass_info(pass_class: type[Pass]) -> PassInfo:
    """Describe `pass_class`; its docstring gives the summary (the first line) and the description."""
    kind, when = next(text for base, text in KINDS.items() if issubclass(pass_class, base))
    summary, _, description = (inspect.getdoc(pass_class) or "").partition("\n")
    plugin = plugins(PASS_GROUP).get(pass_class.name)
    return PassInfo(
        pass_class.name,
        kind,
        when,
        summary,
        description.strip(),
        tuple(_options(pass_class)),
        tuple(_promises(pass_class)),
        "built in" if plugin is None else owner(plugin),
    )


def _options(pass_class: type[Pass]) -> Iterator[Option]:
    kinds = typing.get_type_hints(pass_class)
    for field in dataclasses.fields(pass_class):
        kind = kinds[field.name]
        text = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
        default = None if field.default is dataclasses.MISSING else str(field.default)
        yield Option(field.name, text.replace("triptych.compiler.", ""), default)


def _promises(pass_class: type[Pass]) -> Iterator[tuple[str, str]]:
    for label, values in (
        ("requires", pass_class.requires),
        ("ensures", pass_class.ensures),
        ("after", pass_class.after),
        ("before", pass_class.before),
    ):
        if values:
            yield label, ", ".join(sorted(map(str, values)))
    if pass_class.uniform:
        yield "uniform", "as many matches in every layer of a stack, in every method"
    if pass_class.may_match_nothing:
        yield "optional", "a program without a match passes unchanged; other passes fail there"
    for dtype, tolerance in pass_class.tolerances.items():
        if dtype == "float32":
            yield "tolerance", f"relative {tolerance.relative:g}, KL {tolerance.kl:g} (fp32)"


def pass_page(info: PassInfo) -> str:
    """Return the page of documentation, in Markdown."""
    lines = [f"# {info.name}", "", info.summary, "", f"A {info.kind} pass: it {info.when}."]
    if info.description:
        lines += ["", info.description]
    if info.options:
        lines += ["", "| option | type | default |", "|---|---|---|"]
        lines += [
            f"| `{one.name}` | {one.kind.replace('|', 'or')} | {'required' if one.default is None else one.default} |"
            for one in info.options
        ]
    if info.promises:
        lines += ["", "| promise | |", "|---|---|"]
        lines += [f"| {label} | {text} |" for label, text in info.promises]
    return "\n".join(lines) + "\n"
