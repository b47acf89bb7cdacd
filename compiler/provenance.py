"""Where a node of a graph comes from: the layer and the source line of the model, and the pass that made it.

`torch.export` records the stack of modules and the Python stack of every node; passes keep both on what they
put in a node's place, and the manager adds which pass that was.
"""

from __future__ import annotations

import re
from typing import Final

from torch.fx import Node

MADE_BY: Final = "made_by"
CAPTURE: Final = "capture"
_LIBRARIES: Final = re.compile(r"/torch/(nn/|_|functional|utils/|fx/|export/)|/triptych/(compiler|modules|passes)/")
_FRAME: Final = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def made_by(node: Node) -> str:
    """Return the name of the pass that made `node`, or "capture"."""
    return str(node.meta.get(MADE_BY, CAPTURE))


def module_path(node: Node) -> str:
    """Return the fully qualified name of the innermost module that `node` was traced in; "" at the top."""
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    # torch's own word where it knows no module
    return "" if path.startswith("_empty_nn_module_stack") else path


def layer_of(node: Node) -> str | None:
    """Return the outermost numbered module around `node`, such as "model.layers.3"; None outside of all layers."""
    return layer_in(module_path(node))


def layer_in(path: str) -> str | None:
    """Return `path` up to its first number ("model.layers.3.mlp" → "model.layers.3"), or None where it has none."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return None


def source_line(node: Node) -> str | None:
    """Return the source line behind `node` as "file.py:12", or None where none is recorded.

    It is the innermost line outside torch and Triptych, so the model's own.
    """
    frames = list(_FRAME.finditer(str(node.meta.get("stack_trace") or "")))
    if not frames:
        return None
    frame = next((one for one in reversed(frames) if not _LIBRARIES.search(one["file"])), frames[-1])
    return f"{frame['file'].rsplit('/', 1)[-1]}:{frame['line']}"
