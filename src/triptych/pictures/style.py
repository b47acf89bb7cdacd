"""The colours of pictures, for light screens and paper and for dark screens.

Classes set them and not CSS variables, since programs that are no browsers know the classes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from triptych.pictures.diagram import ArrowKind, BoxKind

MARK_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8250df", "#999999")
"""Okabe and Ito's colours, which colour-blind readers can tell apart; the name of the pass stands beside each."""

_INK: Final = ("#1f2328", "#e6edf3")
_PALE: Final = ("#59636e", "#9198a1")
_PAPER: Final = ("#ffffff", "#0d1117")
_GREY: Final = (("#f6f8fa", "#8c959f"), ("#1c2128", "#768390"))
_HOLLOW: Final = ((_PAPER[0], "#8c959f"), (_PAPER[1], "#768390"))

# (fill, stroke) on a light screen, (fill, stroke) on a dark one
_BOXES: Final[Mapping[BoxKind, tuple[tuple[str, str], tuple[str, str]]]] = {
    "input": (("#ddf4ff", "#0969da"), ("#0c2d4a", "#4493f8")),
    "output": (("#dafbe1", "#1a7f37"), ("#0f2f1a", "#3fb950")),
    "operators": _GREY,
    "state": (("#fff1e5", "#bc4c00"), ("#3a1d0a", "#f0883e")),
    "weight": _GREY,
    "method": (("#fbefff", "#8250df"), ("#271b3d", "#ab7df8")),
    "repeat": ((_PAPER[0], "#8250df"), (_PAPER[1], "#ab7df8")),
    "port": _HOLLOW,
}
_ARROWS: Final[Mapping[ArrowKind, tuple[str, str]]] = {
    "feeds": _INK,
    "uses": ("#8c959f", "#768390"),
    "reads": ("#0969da", "#4493f8"),
    "writes": ("#bc4c00", "#f0883e"),
    "updates": ("#bc4c00", "#f0883e"),
}


def style_sheet() -> str:
    """Return the CSS of every picture; its classes hold below the class ``tp`` only."""
    shared = [
        ".tp text { font-family: ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; white-space: pre }",
        ".tp .title { font-weight: bold }",
        ".tp .box { stroke-width: 1.2 }",
        ".tp .frame { fill: none; stroke-width: 1.6 }",
        ".tp .box.repeat, .tp .box.port { stroke-dasharray: 4 3 }",
        ".tp .arrow { fill: none; stroke-width: 1.3 }",
        ".tp .label { stroke-width: 4; paint-order: stroke; stroke-linejoin: round }",
        *(f".tp .mark{number} {{ fill: {colour} }}" for number, colour in enumerate(MARK_COLOURS)),
    ]
    dark = ["@media screen and (prefers-color-scheme: dark) {", *_colours(1), "}"]
    return "\n".join(["", *shared, *_colours(0), *dark, ""])


def _colours(side: int) -> list[str]:
    rules = [
        f".tp text {{ fill: {_INK[side]} }}",
        f".tp .note {{ fill: {_PALE[side]} }}",
        f".tp .paper {{ fill: {_PAPER[side]} }}",
        f".tp .frame {{ stroke: {_BOXES['method'][side][1]} }}",
        f".tp .label {{ stroke: {_PAPER[side]} }}",
    ]
    for box, colours in _BOXES.items():
        fill, stroke = colours[side]
        rules.append(f".tp .box.{box} {{ fill: {fill}; stroke: {stroke} }}")
    for arrow, pair in _ARROWS.items():
        rules.append(f".tp .arrow.{arrow} {{ stroke: {pair[side]} }} .tp .head.{arrow} {{ fill: {pair[side]} }}")
    return rules
