"""Layers of a method that are the same: which consecutive layers of a stack a picture may draw once.

Two layers are the same where they hold the same operators in the same order, with the same arguments: the same
nodes of the layer, weights of the same name within the layer, other constants, shapes and dtypes, made by the same
passes. They belong to one run where, beyond that, each takes its inputs from the same places, or from the layer
before as its own predecessor does. A layer that a pass rewrote in another way is a run of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor
from torch.fx import Node

from triptych.compiler.editing import bound_names, bound_tensor
from triptych.compiler.program import Method
from triptych.compiler.provenance import layer_of, made_by, module_path
from triptych.compiler.text import dimension_names, tensor_text
from triptych.pictures.values import tensors_in

SMALL_CONSTANT: Final = 64
"""A constant of up to this many elements is compared by its values; a greater one by shape and dtype."""


@dataclass(frozen=True)
class Layer:
    """One layer: its path, its nodes in order, and what makes it comparable.

    `structure` is equal for equal layers. `inputs` are the nodes outside that it uses, in the order of first use,
    and `origins` says of each where it comes from, relative to the layer. `exits` are the positions of the nodes
    that others use.
    """

    path: str
    nodes: tuple[Node, ...]
    structure: tuple[Any, ...]
    inputs: tuple[Node, ...]
    origins: tuple[tuple[Any, ...], ...]
    exits: frozenset[int]

    @property
    def stack(self) -> str:
        """The path of the stack, such as "model.layers"."""
        return self.path.rpartition(".")[0]

    @property
    def number(self) -> int:
        """The place in the stack."""
        return int(self.path.rpartition(".")[2])


@dataclass(frozen=True)
class Run:
    """Consecutive layers of one stack that are the same."""

    layers: tuple[Layer, ...]

    @property
    def path(self) -> str:
        """The path of the layers, such as "model.layers.0…29"."""
        first, last = self.layers[0], self.layers[-1]
        return first.path if len(self.layers) == 1 else f"{first.path}…{last.number}"


def layer_runs(method: Method, groups: Mapping[Node, str]) -> list[Run]:
    """Return the runs of `method` in order; `groups` names the place of each node that lies outside of all layers."""
    found: dict[str, list[Node]] = {}
    for node in method.exported.graph.nodes:
        path = layer_of(node)
        if path is not None:
            found.setdefault(path, []).append(node)
    places = {node: (path, index) for path, nodes in found.items() for index, node in enumerate(nodes)}
    reader = _Reader(method, groups, places)
    runs: list[Run] = []
    for path, nodes in found.items():
        layer = reader.layer(path, nodes)
        if runs and _continues(runs[-1].layers, layer):
            runs[-1] = Run((*runs[-1].layers, layer))
        else:
            runs.append(Run((layer,)))
    return runs


def _continues(run: Sequence[Layer], layer: Layer) -> bool:
    before, first = run[-1], run[0]
    if (layer.stack, layer.number) != (first.stack, before.number + 1):
        return False
    if (layer.structure, layer.exits) != (before.structure, before.exits):
        return False
    return all(
        origin == earlier
        # The first layers of a run may take from elsewhere what the later ones take from the run itself.
        or (origin[0] == "layer" and layer.number - origin[1] >= first.number > before.number - origin[1])
        for origin, earlier in zip(layer.origins, before.origins, strict=True)
    )


class _Reader:
    def __init__(self, method: Method, groups: Mapping[Node, str], places: Mapping[Node, tuple[str, int]]) -> None:
        self._exported = method.exported
        self._bound = bound_names(method.exported)
        self._dimensions = dimension_names(method)
        self._groups = groups
        self._places = places

    def layer(self, path: str, nodes: Sequence[Node]) -> Layer:
        slots: dict[Node, int] = {}
        structure = tuple(self._structure(path, node, slots) for node in nodes)
        return Layer(
            path,
            tuple(nodes),
            structure,
            tuple(slots),
            tuple(self._origin(path, node) for node in slots),
            frozenset(
                index
                for index, node in enumerate(nodes)
                if any(self._places.get(user, ("", 0))[0] != path for user in node.users)
            ),
        )

    def _structure(self, path: str, node: Node, slots: dict[Node, int]) -> tuple[Any, ...]:
        values = tuple(self._tensor(value) for value in tensors_in(node.meta.get("val")))
        arguments = self._argument((node.args, node.kwargs), path, slots)
        return (str(node.target), module_path(node).removeprefix(path), made_by(node), arguments, values)

    def _tensor(self, value: Tensor) -> str:
        # Each layer may have sizes of its own that are known at run time only: u0, u1.
        names = {str(size): "?" for size in value.shape if str(size).startswith("u")}
        return tensor_text(value, {**self._dimensions, **names})

    def _argument(self, value: Any, path: str, slots: dict[Node, int]) -> Any:
        if isinstance(value, Node):
            if value.name in self._bound and value.op == "placeholder":
                return self._constant(self._bound[value.name], path)
            place, index = self._places.get(value, ("", 0))
            return ("node", index) if place == path else ("input", slots.setdefault(value, len(slots)))
        if isinstance(value, (tuple, list)):
            return tuple(self._argument(item, path, slots) for item in value)
        if isinstance(value, dict):
            return tuple((key, self._argument(item, path, slots)) for key, item in value.items())
        if isinstance(value, slice):
            return self._argument((value.start, value.stop, value.step), path, slots)
        return repr(value)

    def _constant(self, name: str, path: str) -> tuple[Any, ...]:
        if name.startswith(f"{path}."):
            return ("own", name.removeprefix(path))
        if name not in self._exported.constants:
            return ("shared", name)
        value = bound_tensor(self._exported, name)
        content = str(value.tolist()) if value.numel() <= SMALL_CONSTANT else ""
        return ("constant", str(value.dtype), tuple(value.shape), content)

    def _origin(self, path: str, node: Node) -> tuple[Any, ...]:
        if node not in self._places:
            return ("outside", self._groups.get(node, node.name))
        place, index = self._places[node]
        stack, _, number = place.rpartition(".")
        own_stack, _, own_number = path.rpartition(".")
        if stack == own_stack:
            return ("layer", int(own_number) - int(number), index)
        return ("other stack", place, index)
