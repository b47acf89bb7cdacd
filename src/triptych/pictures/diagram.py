"""What a picture shows, before anybody knows where it stands: boxes, frames around boxes, and arrows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

BoxKind = Literal["input", "output", "operators", "state", "weight", "method", "repeat", "port"]
ArrowKind = Literal["feeds", "uses", "reads", "writes", "updates"]
LineStyle = Literal["heading", "title", "text", "note", "value"]


@dataclass(frozen=True)
class Line:
    """One line of text in a box. `mark` is the number of a colour, which stands as a small square before it."""

    text: str
    style: LineStyle = "text"
    mark: int | None = None


@dataclass(frozen=True)
class Box:
    """A labelled box. `hint` is what a browser shows when the mouse rests on it."""

    key: str
    kind: BoxKind
    lines: tuple[Line, ...]
    hint: str = ""


@dataclass(frozen=True)
class Frame:
    """A box that holds a diagram of its own, such as one layer of a stack that repeats it."""

    key: str
    title: str
    note: str
    content: Diagram


@dataclass(frozen=True)
class Arrow:
    """From one box or frame to another of the same diagram."""

    source: str
    target: str
    kind: ArrowKind = "feeds"
    label: str = ""


@dataclass(frozen=True)
class Diagram:
    """Boxes, frames and the arrows between them; keys are unique within one diagram."""

    nodes: tuple[Box | Frame, ...]
    arrows: tuple[Arrow, ...]

    def boxes(self) -> Iterator[Box]:
        """Yield every box, those in frames too."""
        for node in self.nodes:
            if isinstance(node, Box):
                yield node
            else:
                yield from node.content.boxes()

    def frames(self) -> Iterator[Frame]:
        """Yield every frame of this diagram; frames do not nest."""
        for node in self.nodes:
            if isinstance(node, Frame):
                yield node


@dataclass(frozen=True)
class LegendEntry:
    """One line of the legend: a kind of box, a kind of arrow, or the number of a mark, with its meaning."""

    sample: BoxKind | ArrowKind | int
    meaning: str


@dataclass(frozen=True)
class Picture:
    """A diagram with its title and the legend of what it uses."""

    title: str
    subtitle: str
    diagram: Diagram
    legend: tuple[LegendEntry, ...]
