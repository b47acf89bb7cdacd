"""Lines of text in boxes: how they wrap and how wide they are.

Text is set in a fixed-width font, so its width is known without measuring a font, and pictures are equal on every
machine. The pictures state the width of every line, and a viewer with another font fits the letters into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from triptych.pictures.diagram import Box, Line, LineStyle

MAX_COLUMNS: Final = 46
FONT_SIZES: Final[dict[LineStyle, float]] = {"heading": 17.0, "title": 12.0, "text": 11.0, "note": 10.0, "value": 11.0}
ADVANCE: Final = 0.602
"""The width of a letter by the font's size: 1229/2048 in DejaVu Sans Mono, Liberation Mono and Menlo."""
MARK_WIDTH: Final = 14.0
_BREAKS: Final = re.compile(r"(?<=[, ])(?=[^ ])|(?<=\.)(?=[^\d .])")


def text_width(text: str, style: LineStyle, marked: bool = False) -> float:
    """Return the width in pixels of a line of text, with the mark before it."""
    return len(text) * FONT_SIZES[style] * ADVANCE + (MARK_WIDTH if marked else 0.0)


def line_height(style: LineStyle) -> float:
    """Return the height in pixels that a line takes."""
    return FONT_SIZES[style] * 1.4


def box_lines(box: Box) -> list[Line]:
    """Return the lines of a box, wrapped after commas, dots and blanks; a line that goes on is indented.

    Nothing wraps at a no-break space.
    """
    return [
        replace(line, text=text, mark=None if index else line.mark)
        for line in box.lines
        for index, text in enumerate(_wrapped(line.text))
    ]


def _wrapped(text: str) -> Iterator[str]:
    line = ""
    for piece in _BREAKS.split(text):
        if line.strip() and len(line) + len(piece.rstrip()) > MAX_COLUMNS:
            yield line.rstrip()
            line = "  "
        line += piece
    yield line.rstrip()
