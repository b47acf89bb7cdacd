"""Pictures of programs and methods: SVG, one HTML page, and the graph format of Google's Model Explorer.

They show what capture and passes made of a model: what methods share, which layers a pass has treated in another
way than their neighbours, and where the nodes are that a pass made. SVG and HTML need igraph, which
``pip install triptych[pictures]`` brings.
"""

from __future__ import annotations

from triptych.compiler.program import Program
from triptych.pictures.drawing import svg_text
from triptych.pictures.method_diagram import method_diagram
from triptych.pictures.model_explorer import model_explorer_json
from triptych.pictures.page import picture_html
from triptych.pictures.program_diagram import program_diagram

__all__ = ["method_picture", "model_explorer_json", "picture_html", "program_picture"]


def program_picture(program: Program) -> str:
    """Return an SVG of the methods of `program`, the weights and state rows they share, and what feeds what.

    Names that differ by layer number only are one line, so the picture does not grow with the number of layers.
    Equal programs give equal text. Raises `UsageError` where igraph is missing.
    """
    return svg_text(program_diagram(program))


def method_picture(program: Program, name: str) -> str:
    """Return an SVG of the graph of the method called `name`, one box for the operators of a module.

    Consecutive layers that are the same are drawn once; one that differs in an operator, an argument, a shape or
    the pass that made a node is drawn apart. Raises `UsageError` for an unknown method or where igraph is missing.
    """
    return svg_text(method_diagram(program, name))
