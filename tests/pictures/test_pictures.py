"""Pictures of small programs: what is folded and what is not, where things stand, and the formats they come in."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import torch
from torch import Tensor

from tests.compiler.tiny import (
    CONTEXT_LENGTH,
    VOCABULARY,
    WIDTH,
    TinyAttention,
    TinyBlock,
    TinyModel,
    captured,
    describe,
    tiny,
)
from triptych.compiler import storage
from triptych.compiler.editing import GraphEditor
from triptych.compiler.program import Program
from triptych.compiler.provenance import layer_of
from triptych.compiler.text import tensor_text
from triptych.errors import UsageError
from triptych.pictures import method_picture, model_explorer_json, picture_html, program_picture
from triptych.pictures.diagram import Arrow, Box, Diagram, Frame
from triptych.pictures.layout import Layout, Placed, lay_out
from triptych.pictures.method_diagram import method_diagram
from triptych.pictures.program_diagram import program_diagram
from triptych.pictures.values import bytes_text, folded_name, number_ranges

SVG: Final = "{http://www.w3.org/2000/svg}"
METHODS: Final = ("token_embedding", "prefill", "decode")


@pytest.fixture(scope="module")
def small() -> Program:
    """Two equal layers."""
    return captured(tiny(layers=2)).program


@pytest.fixture(scope="module")
def deep() -> Program:
    """Thirty equal layers."""
    return captured(tiny(layers=30)).program


class LouderAttention(TinyAttention):
    """Attention with one operator more."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


@pytest.fixture(scope="module")
def uneven() -> Program:
    """Six layers, of which the fourth has another attention."""
    return captured(tiny(*[(LouderAttention if index == 3 else TinyAttention)() for index in range(6)])).program


def pictures(program: Program) -> dict[str, str]:
    return {"program": program_picture(program), **{name: method_picture(program, name) for name in program.methods}}


def plain(text: str) -> str:
    """`text` with the signs of a keyboard."""
    return text.replace("\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}", " x")


def texts_of(box: Box) -> list[str]:
    return [plain(line.text) for line in box.lines]


def named(diagram: Diagram, title: str) -> Box:
    (found,) = (box for box in diagram.boxes() if texts_of(box)[0] == title)
    return found


def stacks(program: Program, method: str) -> list[str]:
    """The titles of frames, and of boxes that stand for layers drawn before, in order."""
    titles = []
    for node in method_diagram(program, method).diagram.nodes:
        if isinstance(node, Frame):
            titles.append(plain(node.title))
        elif node.kind == "repeat":
            titles.append(f"{texts_of(node)[0]}, {texts_of(node)[1]}")
    return titles


# ---------------------------------------------------------------------------------------------------- programs


def test_program_of_thirty_layers_has_as_many_boxes_and_lines_as_of_two(small: Program, deep: Program) -> None:
    for program in (small, deep):
        boxes = list(program_diagram(program).diagram.boxes())
        assert Counter(box.kind for box in boxes) == {"method": 3, "state": 1, "weight": 2}
    sizes = [[len(box.lines) for box in program_diagram(one).diagram.boxes()] for one in (small, deep)]
    assert sizes[0] == sizes[1]


def test_program_names_rows_by_their_layers(deep: Program) -> None:
    state = named(program_diagram(deep).diagram, "60 state rows, 184 kB")
    assert texts_of(state)[1:] == [
        "blocks.0…29.attention.routed_attention.cache.keys",
        f"  float32[1, {CONTEXT_LENGTH}, 2, 16] x30 BSHD, 92.2 kB",
        "blocks.0…29.attention.routed_attention.cache.values",
        f"  float32[1, {CONTEXT_LENGTH}, 2, 16] x30 BSHD, 92.2 kB",
    ]


def test_program_folds_weights_by_their_users(deep: Program) -> None:
    diagram = program_diagram(deep).diagram
    shared = named(diagram, "1 weight, 6.14 kB")
    assert "tied: embedding.weight = head.weight" in texts_of(shared)
    assert {arrow.target for arrow in diagram.arrows if arrow.source == shared.key} == {
        f"method:{name}" for name in METHODS
    }
    layers = named(diagram, "183 weights, 994 kB")
    assert texts_of(layers)[1:3] == ["blocks.*", "  180 weights, float32, 991 kB"]
    assert {arrow.target for arrow in diagram.arrows if arrow.source == layers.key} == {
        "method:prefill",
        "method:decode",
    }


def test_program_shows_what_feeds_what(small: Program) -> None:
    arrows = program_diagram(small).diagram.arrows
    assert Arrow("method:token_embedding", "method:prefill", "feeds", "embeds") in arrows
    assert sum(arrow.kind == "feeds" for arrow in arrows) == 1


def test_program_tells_readers_from_writers(small: Program) -> None:
    kinds = {arrow.kind for arrow in program_diagram(small).diagram.arrows}
    assert kinds == {"feeds", "uses", "updates"}
    rows = {
        name: replace(row, readers=("decode",), writers=("prefill",)) if "keys" in name else row
        for name, row in small.state.items()
    }
    arrows = program_diagram(replace(small, state=rows)).diagram.arrows
    first = "state:blocks.0.attention.routed_attention.cache.keys"
    assert Arrow("method:prefill", first, "writes") in arrows
    assert Arrow(first, "method:decode", "reads") in arrows


def test_program_of_many_modules_stays_bounded(small: Program) -> None:
    (weight,) = (one for one in small.weights.values() if one.key == "positions.weight")
    many = {f"part{n}.weight": replace(weight, key=f"part{n}.weight") for n in range(50)}
    (box,) = (box for box in program_diagram(replace(small, weights=many)).diagram.boxes() if box.kind == "weight")
    assert texts_of(box)[-1] == "and 44 more modules"
    assert len(box.lines) == 14
    assert box.hint.splitlines()[-1] == "and 10 more"


# ---------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS)
def test_method_of_thirty_equal_layers_has_as_many_boxes_as_of_two(small: Program, deep: Program, method: str) -> None:
    counts = [len(list(method_diagram(one, method).diagram.boxes())) for one in (small, deep)]
    assert counts[0] == counts[1]
    assert counts[0] <= 20
    assert method_picture(deep, method).count('class="node"') == counts[1]


def test_equal_layers_are_drawn_once(deep: Program) -> None:
    (frame,) = method_diagram(deep, "decode").diagram.frames()
    assert (plain(frame.title), frame.note) == ("blocks.0…29 x30", "TinyBlock")
    assert [texts_of(box)[0] for box in frame.content.boxes() if box.kind != "port"] == [
        *("norm", "attention", "add", "up", "gelu", "down", "add"),
    ]
    ports = [texts_of(box) for box in frame.content.boxes() if box.kind == "port"]
    assert ports == [
        ["from the layer before", "first: entry point"],
        ["from start_pos"],
        ["to the next layer", "last: norm"],
    ]


def test_box_tells_operators_weights_state_and_results(small: Program) -> None:
    (frame,) = method_diagram(small, "prefill").diagram.frames()
    attention = named(frame.content, "attention")
    assert attention.kind == "state"
    assert texts_of(attention) == [
        "attention",
        "TinyAttention",
        "linear x2, update_cache x2, cached_sdpa, views x13",
        "2 weights, 16.4 kB",
        "state cache.keys, cache.values",
        f"→ float32[1, S, {WIDTH}]",
    ]


def test_arrows_follow_the_values(small: Program) -> None:
    diagram = method_diagram(small, "decode").diagram
    titles = {node.key: plain(node.title) if isinstance(node, Frame) else texts_of(node)[0] for node in diagram.nodes}
    pairs = {(titles[arrow.source], titles[arrow.target]) for arrow in diagram.arrows}
    layers = "blocks.0…1 x2"
    assert pairs == {
        ("tokens: int64[1, 1]", "embedding"),
        ("start_pos: int64[1]", "entry point"),
        ("start_pos: int64[1]", layers),
        ("entry point", "positions"),
        ("embedding", "entry point"),
        ("positions", "entry point"),
        ("entry point", layers),
        (layers, "norm"),
        ("norm", "head"),
        ("head", f"logits: float32[1, 1, {VOCABULARY}]"),
    }


@pytest.mark.parametrize("method", ["prefill", "decode"])
def test_layer_with_another_operator_is_drawn_apart(uneven: Program, method: str) -> None:
    assert stacks(uneven, method) == ["blocks.0…2 x3", "blocks.3", "blocks.4…5 x2, equal to blocks.0…2"]
    frames = {frame.title: frame for frame in method_diagram(uneven, method).diagram.frames()}
    assert "mul" in texts_of(named(frames["blocks.3"].content, "attention"))[2]


def test_layer_with_another_constant_is_drawn_apart() -> None:
    model = tiny(layers=4)
    model.module.blocks[2].norm.eps = 1e-3  # type: ignore[union-attr, index]
    program = captured(model).program
    assert stacks(program, "decode") == ["blocks.0…1 x2", "blocks.2", "blocks.3, equal to blocks.0…1"]


class Shrinking(TinyModel):
    """Only the last position goes through the blocks after the first."""

    def logits(self, embeds: Tensor, positions: Tensor) -> Tensor:
        x = self.blocks[0](embeds + self.positions(positions))[:, -1:]
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(self.norm(x))


def test_layer_of_another_shape_is_drawn_apart() -> None:
    torch.manual_seed(0)
    model = describe(Shrinking(*(TinyBlock(TinyAttention()) for _ in range(3))).eval())
    assert stacks(captured(model).program, "prefill") == ["blocks.0", "blocks.1…2 x2"]


def retyped(program: Program, layer: str) -> Program:
    """`program` with the activation of one layer written anew, the same, by something called "retype"."""
    changed = {}
    for name, method in program.methods.items():
        editor = GraphEditor(method.exported, made_by="retype")
        for node in editor.calls(torch.ops.aten.gelu.default):
            if layer_of(node) == layer:
                editor.inline(node, torch.ops.aten.gelu.default)
        changed[name] = editor.finish()
    return program.with_exported(changed)


def test_layer_that_a_pass_touched_is_drawn_apart_with_its_mark(small: Program) -> None:
    program = retyped(small, "blocks.1")
    assert stacks(program, "decode") == ["blocks.0", "blocks.1"]
    picture = method_diagram(program, "decode")
    marked = [box for box in picture.diagram.boxes() if any(line.mark is not None for line in box.lines)]
    assert [texts_of(box) for box in marked] == [["gelu", f"→ float32[1, 1, {2 * WIDTH}]", "retype"]]
    assert [entry.meaning for entry in picture.legend if entry.sample == 0] == ["made by retype"]
    assert "retype" not in method_picture(program, "token_embedding")


class Branching(TinyModel):
    """The third block does not go on from the second."""

    def logits(self, embeds: Tensor, positions: Tensor) -> Tensor:
        x = embeds + self.positions(positions)
        second = self.blocks[1](self.blocks[0](x))
        return self.head(self.norm(second + self.blocks[2](x)))


def test_layer_that_takes_from_elsewhere_is_drawn_apart() -> None:
    torch.manual_seed(0)
    model = describe(Branching(*(TinyBlock(TinyAttention()) for _ in range(3))).eval())
    assert stacks(captured(model).program, "decode") == ["blocks.0…1 x2", "blocks.2, equal to blocks.0…1"]


class Injecting(TinyModel):
    """Adds to the result of each block outside of it."""

    def logits(self, embeds: Tensor, positions: Tensor) -> Tensor:
        x = embeds + self.positions(positions)
        for block in self.blocks:
            x = block(x) * 0.5
        return self.head(self.norm(x))


def injecting(layers: int) -> Program:
    torch.manual_seed(0)
    return captured(describe(Injecting(*(TinyBlock(TinyAttention()) for _ in range(layers))).eval())).program


def test_what_repeats_between_layers_is_drawn_once() -> None:
    programs = [injecting(2), injecting(4)]
    assert stacks(programs[1], "decode") == ["blocks.0…3 x4"]
    first, second = (method_diagram(one, "decode").diagram for one in programs)
    assert len(list(first.boxes())) == len(list(second.boxes()))
    between = next(box for box in second.boxes() if texts_of(box)[:2] == ["entry point", "mul x4"])
    arrows = {(arrow.source, arrow.target) for arrow in second.arrows}
    frame = next(second.frames())
    assert {(between.key, frame.key), (frame.key, between.key)} <= arrows
    (port,) = (box for box in frame.content.boxes() if box.key == "exit")
    assert texts_of(port) == ["to entry point"]
    check_places(lay_out(second))


def test_program_without_module_stacks_says_so(small: Program, tmp_path: Path) -> None:
    storage.save(small, tmp_path / "program")
    loaded = storage.load(tmp_path / "program")
    assert "the modules of its nodes are not recorded" in method_picture(loaded, "decode")
    assert "the modules of its nodes are not recorded" not in method_picture(small, "decode")


def test_unknown_method_is_refused(small: Program) -> None:
    with pytest.raises(UsageError, match=r"no method 'encode' to draw; the program has token_embedding, prefill, deco"):
        method_picture(small, "encode")


@pytest.mark.parametrize("draw", [program_picture, picture_html, lambda program: method_picture(program, "decode")])
def test_missing_library_is_named(small: Program, monkeypatch: pytest.MonkeyPatch, draw: Any) -> None:
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(UsageError, match=re.escape("pip install triptych[pictures]")):
        draw(small)


# ---------------------------------------------------------------------------------------------------- places


def overlap(one: Placed, other: Placed) -> bool:
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height
        and other.y < one.y + one.height
    )


def check_places(layout: Layout) -> None:
    """Nothing lies over another thing, and every arrow runs from its source to its target, round the others."""
    placed = {one.node.key: one for one in layout.nodes}
    for index, one in enumerate(layout.nodes):
        assert one.x >= 0
        assert one.x + one.width <= layout.width + 0.01
        assert one.y >= 0
        assert one.y + one.height <= layout.height + 0.01
        assert not any(overlap(one, other) for other in layout.nodes[index + 1 :]), one.node.key
        if one.content is not None:
            assert one.content.width < one.width
            assert one.content.height < one.height
            check_places(one.content)
    for route in layout.routes:
        source, target = placed[route.arrow.source], placed[route.arrow.target]
        (start_x, start_y, _), (end_x, _, end_y) = route.stretches[0], route.stretches[-1]
        assert source.x < start_x < source.x + source.width
        assert target.x < end_x < target.x + target.width
        sides = (source.y + source.height, target.y) if route.down else (source.y, target.y + target.height)
        assert (start_y, end_y) == pytest.approx(sides)
        for x, from_y, to_y in route.stretches:
            for other in layout.nodes:
                if other not in (source, target):
                    beside = not other.x < x < other.x + other.width
                    assert beside or max(from_y, to_y) <= other.y or other.y + other.height <= min(from_y, to_y)


@pytest.mark.parametrize("program", ["deep", "uneven"])
def test_boxes_and_arrows_keep_apart(program: str, request: pytest.FixtureRequest) -> None:
    drawn: Program = request.getfixturevalue(program)
    check_places(lay_out(program_diagram(drawn).diagram))
    for name in drawn.methods:
        check_places(lay_out(method_diagram(drawn, name).diagram))


def test_no_text_leaves_its_box(uneven: Program) -> None:
    seen = 0
    for svg in pictures(uneven).values():
        for group in ET.fromstring(svg).iter(f"{SVG}g"):  # noqa: S314  # made here
            if group.get("class") != "node":
                continue
            (outline,) = (one for one in group.iter(f"{SVG}rect") if "box" in one.get("class", ""))
            left, top, width, height = (float(outline.get(key, "")) for key in ("x", "y", "width", "height"))
            for text in group.iter(f"{SVG}text"):
                assert left < float(text.get("x", ""))
                assert float(text.get("x", "")) + float(text.get("textLength", "")) < left + width
                assert top < float(text.get("y", "")) < top + height
                seen += 1
    assert seen > 100


# ---------------------------------------------------------------------------------------------------- formats


def test_svg_is_well_formed_and_names_the_methods(uneven: Program) -> None:
    found = pictures(uneven)
    for svg in found.values():
        root = ET.fromstring(svg)  # noqa: S314  # made here
        assert root.tag == f"{SVG}svg"
        assert float(root.get("width", "")) > 0
    words = [text.text for text in ET.fromstring(found["program"]).iter(f"{SVG}text")]  # noqa: S314
    assert set(METHODS) <= set(words)
    for name in METHODS:
        headings = [text.text for text in ET.fromstring(found[name]).iter(f"{SVG}text")]  # noqa: S314
        assert headings[0] == name


@pytest.mark.slow
def test_pictures_are_the_same_in_every_process(small: Program) -> None:
    code = (
        "import sys\nfrom tests.compiler.tiny import captured, tiny\nfrom triptych.pictures import picture_html\n"
        "sys.stdout.buffer.write(picture_html(captured(tiny(layers=2)).program).encode())\n"
    )
    root = Path(__file__).parents[2]
    # Another seed than that of this process, so that sets of texts are walked in another order.
    seed = str(hash("text") % 1000)
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == picture_html(small)


class Loads(HTMLParser):
    """Collects everything that a page would load or run, and its structure."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [
            value or "" for key, value in attrs if key in {"src", "href", "xlink:href", "data", "action"}
        ]
        self.ids += [value or "" for key, value in attrs if key == "id"]


def test_html_holds_every_picture_and_loads_nothing(uneven: Program) -> None:
    page = picture_html(uneven)
    loads = Loads()
    loads.feed(page)
    assert not re.search(r"https?:|//|@import|url\(", page)
    assert not {"script", "link", "img", "iframe", "object"} & set(loads.tags)
    assert loads.tags["svg"] == 1 + len(METHODS)
    assert loads.addresses == [f"#{name}" for name in loads.ids]
    assert len(set(loads.ids)) == len(loads.ids) == 1 + len(METHODS)
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    for svg in pictures(uneven).values():
        assert svg.replace(' xmlns="http://www.w3.org/2000/svg"', "") in page


# After the dataclasses of model_explorer.graph_builder, ai-edge-model-explorer 0.1.34.
KEY_VALUES: Final = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"key": {"type": "string"}, "value": {"type": "string"}},
        "required": ["key", "value"],
        "additionalProperties": False,
    },
}
METADATA: Final = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"id": {"type": "string"}, "attrs": KEY_VALUES},
        "required": ["id"],
        "additionalProperties": False,
    },
}
EDGE: Final = {
    "type": "object",
    "properties": {
        "sourceNodeId": {"type": "string"},
        "sourceNodeOutputId": {"type": "string"},
        "targetNodeInputId": {"type": "string"},
    },
    "required": ["sourceNodeId"],
    "additionalProperties": False,
}
NODE: Final = {
    "type": "object",
    "properties": {
        "id": {"type": "string"},
        "label": {"type": "string"},
        "namespace": {"type": "string", "pattern": "^([^/]+(/[^/]+)*)?$"},
        "subgraphIds": {"type": "array", "items": {"type": "string"}},
        "attrs": KEY_VALUES,
        "incomingEdges": {"type": "array", "items": EDGE},
        "outputsMetadata": METADATA,
        "inputsMetadata": METADATA,
        "style": {"type": "object"},
        "config": {"type": "object"},
    },
    "required": ["id", "label"],
    "additionalProperties": False,
}
COLLECTION: Final = {
    "type": "object",
    "properties": {
        "label": {"type": "string"},
        "graphs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "nodes": {"type": "array", "items": NODE},
                    "groupNodeAttributes": {
                        "type": "object",
                        "additionalProperties": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                },
                "required": ["id", "nodes"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["label", "graphs"],
    "additionalProperties": False,
}


def explorer_nodes(program: Program, method: str) -> dict[str, dict[str, Any]]:
    (graph,) = (one for one in model_explorer_json(program)["graphs"] if one["id"] == method)
    return {node["id"]: node for node in graph["nodes"]}


def attributes(node: dict[str, Any]) -> dict[str, str]:
    return {pair["key"]: pair["value"] for pair in node["attrs"]}


def test_model_explorer_format(uneven: Program) -> None:
    found = json.loads(json.dumps(model_explorer_json(uneven)))
    jsonschema.validate(found, COLLECTION)
    assert [graph["id"] for graph in found["graphs"]] == list(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_model_explorer_has_every_node_and_edge(uneven: Program, method: str) -> None:
    nodes = explorer_nodes(uneven, method)
    graph = uneven.methods[method].exported.graph
    assert list(nodes) == [node.name for node in graph.nodes]
    edges = {(edge["sourceNodeId"], name) for name, node in nodes.items() for edge in node["incomingEdges"]}
    assert edges == {(used.name, node.name) for node in graph.nodes for used in node.all_input_nodes}
    for node in nodes.values():
        for edge in node["incomingEdges"]:
            outputs = {output["id"] for output in nodes[edge["sourceNodeId"]]["outputsMetadata"]}
            assert edge["sourceNodeOutputId"] in outputs


def test_model_explorer_tells_where_nodes_come_from(small: Program) -> None:
    nodes = explorer_nodes(retyped(small, "blocks.1"), "prefill")
    gelus = [node for node in nodes.values() if node["label"] == "gelu"]
    assert [node["namespace"] for node in gelus] == ["blocks/0", "blocks/1"]
    assert [attributes(node)["made_by"] for node in gelus] == ["capture", "retype"]
    assert re.fullmatch(r"tiny\.py:\d+", attributes(gelus[0])["source"])
    assert attributes(gelus[0])["approximate"] == "tanh"
    assert gelus[0]["outputsMetadata"][0]["attrs"] == [{"key": "tensor_shape", "value": f"float32[1, S, {2 * WIDTH}]"}]
    third = next(node for node in nodes.values() if node["label"] == "getitem" and attributes(node)["1"] == "2")
    assert third["incomingEdges"][0]["sourceNodeOutputId"] == "2"
    kinds = {tuple(attributes(node)) for node in nodes.values() if "cache" in node["namespace"]}
    assert kinds == {("state",)}


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_600, "1 MB"), (425_000_000, "425 MB")],
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "3"), ([2, 0, 1, 5], "0…2,5"), ([10, 9], "9…10"), (range(0, 30, 2), "0,2,4,…,28")],
)
def test_ranges(numbers: Any, text: str) -> None:
    assert number_ranges(numbers) == text


def test_folded_names() -> None:
    assert folded_name(["a.0.b.1", "a.10.b.1", "a.1.b.1"]) == "a.0…1,10.b.1"


def test_symbols_are_replaced_whole() -> None:
    value: Any = SimpleNamespace(dtype=torch.bfloat16, shape=("s1", "2*s17 + s1", 8))
    assert tensor_text(value, {"s1": "S"}) == "bfloat16[S, 2*s17 + S, 8]"
    assert tensor_text(value, {"s1": "S", "s17": "T"}) == "bfloat16[S, 2*T + S, 8]"
