"""The stable text form of a program: golden tests, diffs and eyes read it.

Values are numbered in order (%0, %1 …) and symbols are written as the dynamic dimension they stand for, so
the text of equal programs is equal in every run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.capture import dynamic_symbols
from triptych.compiler.editing import bound_names
from triptych.compiler.program import Method, Program, StateRow, Weight
from triptych.manifest import Dim, TensorSignature

_SYMBOL: Final = re.compile(r"[a-z]+\d+")


def program_text(program: Program, *, graphs: bool = True) -> str:
    """Return the text of `program`: metadata, state, weights, and each method with its graph."""
    lines = ["program"]
    metadata = program.metadata
    lines.append(f"  context {metadata.max_context}, vocabulary {metadata.vocab_size}, eos {list(metadata.eos_ids)}")
    lines.extend(_state_line(row) for row in program.state.values())
    lines.extend(_weight_line(weight) for weight in program.weights.values())
    for name, method in program.methods.items():
        lines.extend(_method_lines(name, method, graphs=graphs))
    return "\n".join(lines) + "\n"


def _state_line(row: StateRow) -> str:
    shape = f"{dtype_text(row.dtype)}{list(row.shape)} {row.layout}"
    return f"  state {row.name}: {shape}, read by {_names(row.readers)}, written by {_names(row.writers)}"


def _weight_line(weight: Weight) -> str:
    tensor = weight.uses[0].tensor
    aliases = "".join(f" = {name}" for name in weight.names if name != weight.key)
    shape = f"{dtype_text(tensor.dtype)}{list(tensor.shape)}"
    return f"  weight {weight.key}{aliases}: {shape}, used by {_names(weight.users)}"


def method_text(name: str, method: Method) -> str:
    """Return the text of one method."""
    return "\n".join(_method_lines(name, method, graphs=True)) + "\n"


def _method_lines(name: str, method: Method, *, graphs: bool) -> Iterator[str]:
    yield f"  method {name} ({', '.join(sorted(map(str, method.roles)))})"
    for port in method.inputs:
        yield f"    in {_port(port, '<-')}"
    for port in method.outputs:
        yield f"    out {_port(port, '->')}"
    if graphs:
        yield from _graph_lines(method)


def _port(port: TensorSignature, arrow: str) -> str:
    links = f" {arrow} {', '.join(port.links)}" if port.links else ""
    return f"{port.name}: {port.dtype}[{', '.join(_dim(dim) for dim in port.shape)}]{links}"


def _dim(dim: Dim) -> str:
    return str(dim) if isinstance(dim, int) else f"{dim.name}={dim.minimum}..{dim.maximum}"


def dtype_text(dtype: torch.dtype) -> str:
    """Return torch's name without the prefix, such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names) if names else "nobody"


def _graph_lines(method: Method) -> Iterator[str]:
    bound = bound_names(method.exported)
    symbols = dimension_names(method)
    labels: dict[Node, str] = {}
    count = 0
    for node in method.exported.graph.nodes:
        if node.op == "placeholder":
            labels[node] = f"@{bound[node.name]}" if node.name in bound else f"${node.name}"
        elif node.op == "output":
            yield f"    return {_argument(node.args[0], labels)}"
        else:
            labels[node] = f"%{count}"
            count += 1
            arguments = [_argument(value, labels) for value in node.args]
            arguments += [f"{key}={_argument(value, labels)}" for key, value in node.kwargs.items()]
            target = node.target if node.op == "get_attr" else _target(node.target)
            yield f"    {labels[node]} = {target}({', '.join(arguments)}){_value(node.meta.get('val'), symbols)}"


def _target(target: object) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def _argument(value: object, labels: Mapping[Node, str]) -> str:
    if isinstance(value, Node):
        return labels[value]
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_argument(item, labels) for item in value) + "]"
    return str(value)


def _value(value: object, symbols: Mapping[str, str]) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f": {tensor_text(value, symbols)}"


def dimension_names(method: Method) -> dict[str, str]:
    """Return symbol → name of the dynamic dimension that it stands for, such as "s65" → "S"."""
    return {symbol: dim.name for symbol, dim in dynamic_symbols(method.exported, method.inputs).items()}


def tensor_text(value: Tensor, names: Mapping[str, str]) -> str:
    """Return dtype and shape such as "float32[1, S, 576]", symbols by their `names`."""
    sizes = [_SYMBOL.sub(lambda found: names.get(found[0], found[0]), str(size)) for size in value.shape]
    return f"{dtype_text(value.dtype)}[{', '.join(sizes)}]"
