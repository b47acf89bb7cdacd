"""The `Program`: several captured methods, the state they share, the weights they use.

A program is immutable. Its tables are derived from the methods and never edited, so they cannot disagree
with the graphs: `Program.build` makes them, and every pass result goes through it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Final

import networkx
import torch
from torch import Tensor
from torch.export import ExportedProgram

from triptych.compiler.editing import bound_names, bound_tensor, mutated_buffers, storage_identity, tensor_names
from triptych.compiler.model import Metadata
from triptych.compiler.roles import Role
from triptych.errors import VerificationError
from triptych.manifest import TensorSignature
from triptych.modules.routing import HANDLER_NAME

KV_LAYOUT: Final = "BSHD"
RING_LAYOUT: Final = "BRHD"


@dataclass(frozen=True)
class Method:
    """One captured entry point: the graph, what it is for, and its named inputs and outputs."""

    exported: ExportedProgram
    roles: frozenset[Role]
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]


@dataclass(frozen=True)
class StateRow:
    """One mutable buffer, shared by every method that names it.

    `initial` is its value before the first call. `layout` names the axes: "BSHD" for rows of a KV cache with a slot
    for every position; "BRHD" for those of a ring, which has fewer slots than the context and writes them again; else
    "any". A method that writes without reading is a writer only.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    initial: Tensor
    readers: tuple[str, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class WeightUse:
    """One name under which one method sees a stored weight."""

    method: str
    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Weight:
    """One storage, however many names and methods share it. `key` is the first name, unique in the table."""

    key: str
    dtype: torch.dtype
    nbytes: int
    uses: tuple[WeightUse, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All fully qualified names, sorted; more than one means aliases (tied weights)."""
        return tuple(sorted({use.name for use in self.uses}))

    @property
    def users(self) -> tuple[str, ...]:
        """The methods that use it, sorted."""
        return tuple(sorted({use.method for use in self.uses}))


StateTable = Mapping[str, StateRow]
WeightTable = Mapping[str, Weight]


@dataclass(frozen=True)
class Program:
    """Methods over shared state and weights. Make one with `build`, change one with `with_methods`."""

    methods: Mapping[str, Method]
    state: StateTable
    weights: WeightTable
    metadata: Metadata

    @classmethod
    def build(cls, methods: Mapping[str, Method], metadata: Metadata) -> Program:
        """Derive the tables; raises `VerificationError` where methods disagree about a state row."""
        return cls(
            MappingProxyType(dict(methods)),
            MappingProxyType(_state_table(methods, metadata.max_context)),
            MappingProxyType(_weight_table(methods)),
            metadata,
        )

    def with_methods(self, methods: Mapping[str, Method]) -> Program:
        """Return the program with other methods and tables derived from them."""
        return Program.build(methods, self.metadata)

    def with_exported(self, exported: Mapping[str, ExportedProgram]) -> Program:
        """Return the program with other graphs for the methods named."""
        from triptych.compiler.capture import output_signatures

        changed = dict(self.methods)
        for name, graph in exported.items():
            method = self.methods[name]
            outputs = output_signatures(graph, method.outputs, method.inputs)
            changed[name] = dataclasses.replace(method, exported=graph, outputs=outputs)
        return self.with_methods(changed)

    def methods_with(self, kind: str) -> Iterator[tuple[str, Method]]:
        """Yield the methods that have a role of `kind`."""
        for name, method in self.methods.items():
            if any(role.kind == kind for role in method.roles):
                yield name, method

    @cached_property
    def graph(self) -> networkx.MultiDiGraph[str]:
        """Methods, state and weights as nodes ("method:prefill"), *feeds*, *reads*, *writes*, *uses* as edges."""
        graph: networkx.MultiDiGraph[str] = networkx.MultiDiGraph()
        for name in self.methods:
            graph.add_node(f"method:{name}", kind="method")
        for row in self.state.values():
            graph.add_node(f"state:{row.name}", kind="state")
            for method in row.readers:
                graph.add_edge(f"state:{row.name}", f"method:{method}", kind="reads")
            for method in row.writers:
                graph.add_edge(f"method:{method}", f"state:{row.name}", kind="writes")
        for weight in self.weights.values():
            graph.add_node(f"weight:{weight.key}", kind="weight")
            for method in weight.users:
                graph.add_edge(f"weight:{weight.key}", f"method:{method}", kind="uses")
        for name, consumer in self.methods.items():
            for port in consumer.inputs:
                for link in port.links:
                    producer, _, output = link.partition(".")
                    if producer in self.methods:
                        graph.add_edge(
                            f"method:{producer}", f"method:{name}", kind="feeds", output=output, input=port.name
                        )
        return graph


def _state_table(methods: Mapping[str, Method], max_context: int) -> dict[str, StateRow]:
    changed = {name: mutated_buffers(method.exported) for name, method in methods.items()}
    rows: dict[str, StateRow] = {}
    for row_name in sorted(frozenset().union(*changed.values())):
        users = [name for name, method in methods.items() if row_name in bound_names(method.exported).values()]
        tensors = [bound_tensor(methods[name].exported, row_name) for name in users]
        first = tensors[0]
        for name, tensor in zip(users, tensors, strict=True):
            if (tensor.shape, tensor.dtype, storage_identity(tensor)) != (
                first.shape,
                first.dtype,
                storage_identity(first),
            ):
                raise VerificationError(
                    f"state {row_name!r} is not one row: {users[0]} has {first.dtype} {list(first.shape)}, {name} has "
                    f"{tensor.dtype} {list(tensor.shape)} or another storage; capture all methods from one module"
                )
        rows[row_name] = StateRow(
            row_name,
            tuple(first.shape),
            first.dtype,
            _layout(row_name, first, max_context),
            first,
            tuple(name for name in users if _reads(methods[name].exported, row_name)),
            tuple(name for name in users if row_name in changed[name]),
        )
    return rows


def _layout(name: str, row: Tensor, max_context: int) -> str:
    if HANDLER_NAME not in name.split("."):
        return "any"
    return RING_LAYOUT if row.dim() == len(RING_LAYOUT) and row.shape[1] < max_context else KV_LAYOUT


def _reads(exported: ExportedProgram, name: str) -> bool:
    """True where a node other than a plain write uses the buffer."""
    placeholders = {fqn: argument for argument, fqn in bound_names(exported).items()}
    node = next(node for node in exported.graph.nodes if node.name == placeholders[name])
    for user in node.users:
        is_write = (
            isinstance(user.target, torch._ops.OpOverload)
            and not user.users
            and user.args
            and user.args[0] is node
            and user.target._schema.is_mutable
        )
        if not is_write:
            return True
    return False


def _weight_table(methods: Mapping[str, Method]) -> dict[str, Weight]:
    uses: dict[int, list[WeightUse]] = {}
    state = frozenset().union(*(mutated_buffers(method.exported) for method in methods.values()))
    for method_name, method in methods.items():
        for name in tensor_names(method.exported):
            if name not in state:
                tensor = bound_tensor(method.exported, name)
                uses.setdefault(storage_identity(tensor), []).append(WeightUse(method_name, name, tensor))
    table: dict[str, Weight] = {}
    for found in uses.values():
        ordered = tuple(sorted(found, key=lambda use: (use.name, use.method)))
        key = ordered[0].name
        if key in table:
            key = f"{key}@{ordered[0].method}"
        table[key] = Weight(key, ordered[0].tensor.dtype, ordered[0].tensor.untyped_storage().nbytes(), ordered)
    return dict(sorted(table.items()))
