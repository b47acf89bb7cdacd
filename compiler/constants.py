"""Which values of a graph depend on weights and constants alone, and computing one of them at compile time."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.aliasing import Aliases, is_writer
from triptych.compiler.editing import GraphEditor
from triptych.compiler.provenance import module_path

QUANTIZERS: Final = ("torchao", "quantized_decomposed")
"""Libraries whose operators are patterns that targets look for as they stand."""


def constant_values(editor: GraphEditor) -> frozenset[Node]:
    """Return the calls that give the same in every call of the method, and may be left out of it.

    1. Their operands are weights, literals and each other; state, inputs and sizes that a run decides are none.
    2. They are deterministic, write nothing, and nobody writes in place what they give.
    3. They are no part of a quantized weight: what targets recognize as one has to stay.
    """
    aliases = Aliases(editor)
    written = aliases.of_writes(editor.graph.nodes)
    found: set[Node] = set()
    for node in editor.graph.nodes:
        operands = node.all_input_nodes
        if (
            _is_plain_call(node)
            and all(used in found or editor.is_weight(used) for used in operands)
            and not aliases.of(node) & written
        ):
            found.add(node)
    return frozenset(found)


def _is_plain_call(node: Node) -> bool:
    """True for a deterministic operator that writes nothing and gives tensors of sizes known now."""
    if node.op != "call_function":
        return False
    values = node.meta.get("val")
    values = values if isinstance(values, (tuple, list)) else (values,)
    if not all(isinstance(one, Tensor) and all(isinstance(size, int) for size in one.shape) for one in values):
        return False
    if node.target is operator.getitem:
        return True
    target = node.target
    if not isinstance(target, OpOverload) or is_writer(node) or target.namespace in QUANTIZERS:
        return False
    # Memory that nobody filled has no value to keep.
    is_empty = target._schema.name.startswith(("aten::empty", "aten::new_empty"))
    return not is_empty and torch.Tag.nondeterministic_seeded not in target.tags


@dataclass(frozen=True)
class Cone:
    """A constant value with everything it is computed from: weights, and calls in graph order."""

    node: Node
    sources: tuple[Node, ...]
    calls: tuple[Node, ...]

    @classmethod
    def of(cls, node: Node) -> Cone:
        """Collect what `node` depends on."""
        found, waiting = {node}, [node]
        while waiting:
            for used in waiting.pop().all_input_nodes:
                if used not in found:
                    found.add(used)
                    waiting.append(used)
        ordered = sorted(found)
        is_source = [one.op == "placeholder" for one in ordered]
        return cls(
            node,
            tuple(one for one, source in zip(ordered, is_source, strict=True) if source),
            tuple(one for one, source in zip(ordered, is_source, strict=True) if not source),
        )

    @property
    def expression(self) -> Hashable:
        """What two cones have in common that compute alike from equal sources."""
        numbers = {one: index for index, one in enumerate((*self.sources, *self.calls))}
        return tuple((str(one.target), _frozen((one.args, one.kwargs), numbers)) for one in self.calls)

    def compute(self, *tensors: Tensor) -> Tensor:
        """Return the value, given those of `sources`."""
        known: dict[Node, Any] = dict(zip(self.sources, tensors, strict=True))
        for one in self.calls:
            args, kwargs = torch.fx.map_arg((one.args, one.kwargs), known.__getitem__)
            assert callable(one.target)
            known[one] = one.target(*args, **kwargs)
        found: Tensor = known[self.node]
        return found


def fold(editor: GraphEditor, node: Node) -> Node:
    """Replace a constant value by a weight that holds it; methods that compute the same from the same share it."""
    cone = Cone.of(node)
    path, name = module_path(node), f"folded_{node.name}"
    weight = editor.derive_weight(
        f"{path}.{name}" if path else name, cone.sources, partial(_compute, cone), key=cone.expression
    )
    node.replace_all_uses_with(weight)
    return weight


def _compute(cone: Cone, *tensors: Tensor) -> Tensor:
    return cone.compute(*tensors)


def _frozen(value: Any, numbers: Mapping[Node, int]) -> Hashable:
    if isinstance(value, Node):
        return ("node", numbers[value])
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item, numbers) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, numbers)) for key, item in value.items())
    return (type(value).__name__, repr(value))
