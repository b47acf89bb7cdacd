"""Where boxes and arrows stand: igraph's layered layout, spread out by the real sizes of the boxes.

igraph (Sugiyama's method) chooses the rows, the order within a row and the way of every arrow through the rows,
for points without a size. Here each row gets the height of its highest box, boxes of a row move apart as far as
their widths ask for, and arrows keep the place that igraph left for them between the boxes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import networkx

from triptych.errors import UsageError
from triptych.pictures.diagram import Arrow, Box, Diagram, Frame
from triptych.pictures.text import box_lines, line_height, text_width

PADDING: Final = 8.0
COLUMN_GAP: Final = 26.0
ROW_GAP: Final = 34.0
LANE: Final = 18.0
"""The room that an arrow takes where it passes between boxes."""
FRAME_HEADER: Final = 24.0
FRAME_PADDING: Final = 16.0
BOX_WEIGHT: Final = 20.0
"""How much less a box gives way than a passing arrow."""


@dataclass(frozen=True)
class Placed:
    """A box or frame with its place: left, top, width and height in pixels; `content` for a frame."""

    node: Box | Frame
    x: float
    y: float
    width: float
    height: float
    content: Layout | None = None

    @property
    def centre(self) -> float:
        """The middle between left and right."""
        return self.x + self.width / 2


@dataclass(frozen=True)
class Route:
    """The way of an arrow: vertical stretches (x, from y, to y), which curves between the rows connect."""

    arrow: Arrow
    stretches: tuple[tuple[float, float, float], ...]
    down: bool


@dataclass(frozen=True)
class Layout:
    """A diagram in place; the top left corner is (0, 0)."""

    nodes: tuple[Placed, ...]
    routes: tuple[Route, ...]
    width: float
    height: float


@dataclass
class _Item:
    """A box, a frame, or the passage of an arrow through a row."""

    row: int
    wanted: float
    width: float
    height: float
    x: float = 0.0
    """The middle, once it is known."""

    @property
    def is_lane(self) -> bool:
        """True for the passage of an arrow, which has no height."""
        return self.height == 0


def lay_out(diagram: Diagram) -> Layout:
    """Place `diagram`; raises `UsageError` where igraph is missing."""
    contents = {frame.key: lay_out(frame.content) for frame in diagram.frames()}
    sizes = {node.key: _size(node, contents.get(node.key)) for node in diagram.nodes}
    rows, columns, passages = _igraph_layout(diagram)
    typical = sorted(width for width, _ in sizes.values())[len(sizes) // 2] if sizes else 0.0
    unit = typical / 2 + COLUMN_GAP
    boxes = {key: _Item(rows[key], columns[key] * unit, *sizes[key]) for key in sizes}
    lanes = [[_Item(row, column * unit, LANE, 0.0) for row, column in passage] for passage in passages]
    items = [*boxes.values(), *itertools.chain.from_iterable(lanes)]
    tops, bottoms, y = [], [], 0.0
    for row in range(max((item.row for item in items), default=-1) + 1):
        members = sorted((item for item in items if item.row == row), key=lambda item: item.wanted)
        _spread(members)
        tops.append(y)
        y += max((item.height for item in members), default=0.0)
        bottoms.append(y)
        y += ROW_GAP
    left = min((item.x - item.width / 2 for item in items), default=0.0)
    for item in items:
        item.x -= left
    placed = {}
    for node in diagram.nodes:
        item = boxes[node.key]
        x, y = item.x - item.width / 2, (tops[item.row] + bottoms[item.row] - item.height) / 2
        placed[node.key] = Placed(node, x, y, item.width, item.height, contents.get(node.key))
    routes = _routes(diagram, placed, rows, lanes, tops, bottoms)
    width = max((item.x + item.width / 2 for item in items), default=0.0)
    return Layout(tuple(placed.values()), routes, width, bottoms[-1] if bottoms else 0.0)


def _size(node: Box | Frame, content: Layout | None) -> tuple[float, float]:
    if isinstance(node, Frame):
        assert content is not None
        header = text_width(f"{node.title}  {node.note}", "title")
        return max(content.width, header) + 2 * FRAME_PADDING, content.height + FRAME_HEADER + 2 * FRAME_PADDING
    lines = box_lines(node)
    width = max(text_width(line.text, line.style, line.mark is not None) for line in lines)
    return width + 2 * PADDING, sum(line_height(line.style) for line in lines) + 2 * PADDING


def _igraph_layout(
    diagram: Diagram,
) -> tuple[dict[str, int], dict[str, float], list[list[tuple[int, float]]]]:
    """Return row and column of each node, and the passages (row, column) of each arrow in its direction."""
    try:
        import igraph
    except ImportError as error:
        raise UsageError("pictures need igraph, which is not installed: pip install triptych[pictures]") from error
    keys = [node.key for node in diagram.nodes]
    number = {key: index for index, key in enumerate(keys)}
    edges = [(number[arrow.source], number[arrow.target]) for arrow in diagram.arrows]
    if not keys:
        return {}, {}, []
    graph = igraph.Graph(n=len(keys), edges=edges, directed=True)
    layout: Any = graph.layout_sugiyama(layers=_rows(len(keys), edges), hgap=1, vgap=1, maxiter=1000)
    rows = {key: round(layout[index][1]) for key, index in number.items()}
    columns = {key: float(layout[index][0]) for key, index in number.items()}
    passages = []
    for arrow, points in zip(diagram.arrows, layout.edge_routing, strict=True):
        upwards = rows[arrow.source] > rows[arrow.target]
        passages.append(sorted(((round(y), float(x)) for x, y in points), reverse=upwards))
    return rows, columns, passages


def _rows(count: int, edges: Sequence[tuple[int, int]]) -> list[int] | None:
    """Return the row of each node, as near to what it leads to as can be; None where arrows go in a circle.

    Left to itself, igraph puts every source into the first row, however far below its first user stands.
    """
    graph: networkx.DiGraph[int] = networkx.DiGraph(edges)
    graph.add_nodes_from(range(count))
    if not networkx.is_directed_acyclic_graph(graph):
        return None
    generations = list(networkx.topological_generations(graph.reverse()))
    return [row for _, row in sorted((node, len(generations) - 1 - i) for i, g in enumerate(generations) for node in g)]


def _spread(members: Sequence[_Item]) -> None:
    """Set the middles of a row's members: nearest to where they want to be, and none over another.

    The weighted least squares under an order is the pool-adjacent-violators algorithm (Barlow et al., Statistical
    Inference under Order Restrictions, 1972), after the distances that the widths ask for are taken off.
    """
    offsets, offset = [], 0.0
    for index, item in enumerate(members):
        if index:
            before = members[index - 1]
            gap = 0.0 if before.is_lane or item.is_lane else COLUMN_GAP
            offset += (before.width + item.width) / 2 + gap
        offsets.append(offset)
    pools: list[tuple[float, float, int]] = []
    for item, at in zip(members, offsets, strict=True):
        weight = 1.0 if item.is_lane else BOX_WEIGHT
        value, count = item.wanted - at, 1
        while pools and pools[-1][0] > value:
            other, other_weight, other_count = pools.pop()
            value = (value * weight + other * other_weight) / (weight + other_weight)
            weight, count = weight + other_weight, count + other_count
        pools.append((value, weight, count))
    values = [value for value, _, count in pools for _ in range(count)]
    for item, value, at in zip(members, values, offsets, strict=True):
        item.x = value + at


# ---------------------------------------------------------------------------------------------------- arrows


def _routes(
    diagram: Diagram,
    placed: dict[str, Placed],
    rows: dict[str, int],
    lanes: list[list[_Item]],
    tops: Sequence[float],
    bottoms: Sequence[float],
) -> tuple[Route, ...]:
    """Lead each arrow from the side of its source to the side of its target through its passages."""
    down = [rows[arrow.source] <= rows[arrow.target] for arrow in diagram.arrows]
    neighbours: dict[tuple[str, bool], list[tuple[float, int, bool]]] = {}
    for index, arrow in enumerate(diagram.arrows):
        first = lanes[index][0].x if lanes[index] else placed[arrow.target].centre
        last = lanes[index][-1].x if lanes[index] else placed[arrow.source].centre
        neighbours.setdefault((arrow.source, down[index]), []).append((first, index, True))
        neighbours.setdefault((arrow.target, not down[index]), []).append((last, index, False))
    ends: dict[tuple[int, bool], tuple[float, float]] = {}
    for (key, at_bottom), arrows in neighbours.items():
        box = placed[key]
        step = min(24.0, box.width * 0.8 / len(arrows))
        for position, (_, index, is_source) in enumerate(sorted(arrows)):
            x = box.centre + (position - (len(arrows) - 1) / 2) * step
            ends[index, is_source] = (x, box.y + box.height if at_bottom else box.y)
    routes = []
    for index, arrow in enumerate(diagram.arrows):
        near, far = (tops, bottoms) if down[index] else (bottoms, tops)
        (start_x, start_y), (end_x, end_y) = ends[index, True], ends[index, False]
        stretches = [
            (start_x, start_y, far[rows[arrow.source]]),
            *((lane.x, near[lane.row], far[lane.row]) for lane in lanes[index]),
            (end_x, near[rows[arrow.target]], end_y),
        ]
        routes.append(Route(arrow, tuple(stretches), down[index]))
    return tuple(routes)
