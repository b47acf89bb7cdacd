"""A picture as SVG text: boxes, curves, a legend.

Equal pictures give equal text. It loads nothing, and its words stay words: they can be searched and copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, get_args
from xml.etree import ElementTree as ET
from xml.etree.ElementTree import Element, SubElement

from triptych.pictures.diagram import ArrowKind, Box, LegendEntry, LineStyle, Picture
from triptych.pictures.layout import FRAME_HEADER, FRAME_PADDING, PADDING, Layout, Placed, Route, lay_out
from triptych.pictures.style import MARK_COLOURS, style_sheet
from triptych.pictures.text import FONT_SIZES, MARK_WIDTH, box_lines, line_height, text_width

MARGIN: Final = 20.0
TITLE_HEIGHT: Final = 24.0
LEGEND_ROW: Final = 20.0
LEGEND_SAMPLE: Final = 32.0
MIN_WIDTH: Final = 700.0
HEAD: Final = 8.0


def svg_text(picture: Picture) -> str:
    """Lay out and draw `picture`; raises `UsageError` where igraph is missing."""
    layout = lay_out(picture.diagram)
    width = max(layout.width, MIN_WIDTH, text_width(picture.subtitle, "text")) + 2 * MARGIN
    root = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "class": "tp", "role": "img"})
    SubElement(root, "title").text = picture.title
    SubElement(root, "style").text = style_sheet()
    paper = SubElement(root, "rect", {"class": "paper"})
    _text(root, MARGIN, MARGIN + 14, picture.title, "heading")
    _text(root, MARGIN, MARGIN + TITLE_HEIGHT + 10, picture.subtitle, "text", "note")
    top = _legend(root, picture.legend, MARGIN + TITLE_HEIGHT + 28, width)
    _diagram(root, layout, (width - layout.width) / 2, top)
    size = {"width": _number(width), "height": _number(top + layout.height + MARGIN)}
    paper.attrib.update(size)
    root.attrib.update({**size, "viewBox": f"0 0 {size['width']} {size['height']}"})
    ET.indent(root, "")
    return ET.tostring(root, encoding="unicode") + "\n"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(parent: Element, x: float, y: float, text: str, style: LineStyle, *classes: str) -> Element:
    """Add a line of text that starts at `x`, with its base at `y`; viewers fit it into the width laid out for it."""
    attributes = {"x": _number(x), "y": _number(y), "font-size": _number(FONT_SIZES[style])}
    if text:
        attributes |= {"textLength": _number(text_width(text, style)), "lengthAdjust": "spacingAndGlyphs"}
    names = [*(["title"] if style in {"title", "heading"} else []), *(["note"] if style == "note" else []), *classes]
    if names:
        attributes["class"] = " ".join(names)
    element = SubElement(parent, "text", attributes)
    element.text = text
    return element


def _rectangle(parent: Element, names: str, x: float, y: float, width: float, height: float, radius: float) -> None:
    place = {"x": x, "y": y, "width": width, "height": height, "rx": radius}
    SubElement(parent, "rect", {"class": names, **{key: _number(value) for key, value in place.items()}})


# ---------------------------------------------------------------------------------------------------- diagram


def _diagram(parent: Element, layout: Layout, x: float, y: float) -> None:
    group = SubElement(parent, "g", {"transform": f"translate({_number(x)} {_number(y)})"})
    for route in layout.routes:
        _arrow(group, route)
    for placed in layout.nodes:
        if isinstance(placed.node, Box):
            _box(group, placed, placed.node)
        else:
            _frame(group, placed)
    for route in layout.routes:
        _arrow_label(group, route)


def _box(parent: Element, placed: Placed, box: Box) -> None:
    group = SubElement(parent, "g", {"class": "node"})
    if box.hint:
        SubElement(group, "title").text = box.hint
    radius = placed.height / 2 if box.kind in {"port", "input", "output"} else 4.0
    _rectangle(group, f"box {box.kind}", placed.x, placed.y, placed.width, placed.height, min(radius, 14.0))
    y = placed.y + PADDING
    for line in box_lines(box):
        x = placed.x + PADDING
        base = y + FONT_SIZES[line.style]
        if line.mark is not None:
            _mark(group, line.mark, x, base - 8)
        _text(group, x + (MARK_WIDTH if line.mark is not None else 0), base, line.text, line.style)
        y += line_height(line.style)


def _mark(parent: Element, number: int, x: float, y: float) -> None:
    _rectangle(parent, f"mark{number % len(MARK_COLOURS)}", x, y, 9, 9, 1)


def _frame(parent: Element, placed: Placed) -> None:
    frame, content = placed.node, placed.content
    assert content is not None
    assert not isinstance(frame, Box)
    group = SubElement(parent, "g", {"class": "layers"})
    _rectangle(group, "frame", placed.x, placed.y, placed.width, placed.height, 8)
    _text(group, placed.x + FRAME_PADDING, placed.y + FRAME_PADDING + 6, frame.title, "title")
    note = placed.x + FRAME_PADDING + text_width(f"{frame.title}  ", "title")
    _text(group, note, placed.y + FRAME_PADDING + 6, frame.note, "note")
    left = placed.x + (placed.width - content.width) / 2
    _diagram(group, content, left, placed.y + FRAME_HEADER + FRAME_PADDING)


def _arrow(parent: Element, route: Route) -> None:
    kind = route.arrow.kind
    first, last = route.stretches[0], route.stretches[-1]
    pieces = [f"M{_number(first[0])} {_number(first[1])}"]
    before: tuple[float, float] | None = None
    for x, start, end in route.stretches:
        if before is not None:
            middle = _number((before[1] + start) / 2)
            pieces.append(f"C{_number(before[0])} {middle} {_number(x)} {middle} {_number(x)} {_number(start)}")
        if start != end:
            pieces.append(f"L{_number(x)} {_number(end)}")
        before = x, end
    SubElement(parent, "path", {"class": f"arrow {kind}", "d": "".join(pieces)})
    _head(parent, kind, last[0], last[2], down=route.down)
    if kind == "updates":
        _head(parent, kind, first[0], first[1], down=not route.down)


def _head(parent: Element, kind: ArrowKind, x: float, y: float, *, down: bool) -> None:
    """Add the head of an arrow whose tip is at (x, y)."""
    back = y - HEAD if down else y + HEAD
    points = f"{_number(x)},{_number(y)} {_number(x - 4)},{_number(back)} {_number(x + 4)},{_number(back)}"
    SubElement(parent, "polygon", {"class": f"head {kind}", "points": points})


def _arrow_label(parent: Element, route: Route) -> None:
    if route.arrow.label:
        (x, _, start), (other, end, _) = route.stretches[-2:]
        middle = (x + other) / 2 - text_width(route.arrow.label, "note") / 2
        _text(parent, middle, (start + end) / 2 + 3, route.arrow.label, "note", "label")


# ---------------------------------------------------------------------------------------------------- legend


def _legend(parent: Element, entries: Sequence[LegendEntry], top: float, width: float) -> float:
    """Draw the legend in lines of `width`; return where the diagram may begin."""
    x, y = MARGIN, top
    for entry in entries:
        needed = LEGEND_SAMPLE + text_width(entry.meaning, "note") + 22
        if x > MARGIN and x + needed > width - MARGIN:
            x, y = MARGIN, y + LEGEND_ROW
        group = SubElement(parent, "g")
        _sample(group, entry, x, y)
        _text(group, x + LEGEND_SAMPLE, y + 11, entry.meaning, "note")
        x += needed
    return y + LEGEND_ROW + MARGIN


def _sample(parent: Element, entry: LegendEntry, x: float, y: float) -> None:
    if isinstance(entry.sample, int):
        _mark(parent, entry.sample, x + 15, y + 3)
    elif entry.sample in get_args(ArrowKind):
        SubElement(parent, "path", {"class": f"arrow {entry.sample}", "d": f"M{_number(x)} {_number(y + 7)}h22"})
        heads = [
            f"{_number(x + 24)},{_number(y + 7)} {_number(x + 16)},{_number(y + 3)} {_number(x + 16)},{_number(y + 11)}"
        ]
        if entry.sample == "updates":
            heads.append(
                f"{_number(x)},{_number(y + 7)} {_number(x + 8)},{_number(y + 3)} {_number(x + 8)},{_number(y + 11)}"
            )
        for points in heads:
            SubElement(parent, "polygon", {"class": f"head {entry.sample}", "points": points})
    else:
        _rectangle(parent, f"box {entry.sample}", x, y + 1, 24, 12, 3)
