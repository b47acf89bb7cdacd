"""``quantize-embedding``: the table of token embeddings is stored in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.derived_weights import DerivedWeights
from triptych.compiler.editing import GraphEditor, storage_identity
from triptych.compiler.matching import shown
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES, MatchLog, ProgramPass, Tolerance
from triptych.compiler.program import Program
from triptych.compiler.properties import QUANTIZED, Property

aten = torch.ops.aten
EMBEDDING: Final = aten.embedding.default
TOKENS: Final = "tokens"
# About twice what rounding moves at most: with 8 bits in the embedded model (relative 0.024, KL 1.2e-3), with 4 bits in
# a random one of two layers (0.14, 1.6e-3). 4 bits change the embedded model by far more, and the oracle says so.
EIGHT_BITS: Final = Tolerance(relative=5e-2, kl=3e-3)
FOUR_BITS: Final = Tolerance(relative=3e-1, kl=5e-3)


def _everywhere(tolerance: Tolerance) -> Mapping[str, Tolerance]:
    return MappingProxyType(dict.fromkeys(DEFAULT_TOLERANCES, tolerance))


@dataclass(frozen=True)
class QuantizeEmbedding(ProgramPass):
    """Replace ``embedding`` over a float table by ``triptych::quantized_embedding`` over integers and scales.

    1. A table is one that tokens look up: the indices come from an input that is linked to "tokens". Tables of
       positions stay as they are.
    2. Each row is quantized symmetrically, in groups of `group` elements or as a whole: the scale is the smallest with
       which no element is clipped, in float32. An element takes `bits` bits; of 4, two are packed in a byte.
    3. All methods share the table. A table that anything else uses, such as a projection to the vocabulary that is
       tied to it, would be stored beside its quantized form: that is refused, unless `untie` accepts the bytes.
    4. Left alone are quantized tables, and rows that do not fall into groups.

    There is no eager counterpart, so the tolerance is what rounding moves: see `EIGHT_BITS` and `FOUR_BITS`.
    """

    name: ClassVar[str] = "quantize-embedding"
    ensures: ClassVar[frozenset[Property]] = frozenset({QUANTIZED})
    tolerances: ClassVar[Mapping[str, Tolerance]] = _everywhere(EIGHT_BITS)

    bits: Literal[8, 4] = 8
    group: int | None = None
    untie: bool = False

    def __post_init__(self) -> None:
        if self.bits == 4:
            # What rounding moves depends on the option, so this instance declares more than its class.
            object.__setattr__(self, "tolerances", _everywhere(FOUR_BITS))

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Quantize each table once and let every method look rows up in it."""
        derived = DerivedWeights(program.state)
        editors = {name: GraphEditor(method.exported, self.name, derived) for name, method in program.methods.items()}
        lookups: dict[int, list[tuple[str, Node]]] = {}
        for name, editor in editors.items():
            inputs = {port.name for port in program.methods[name].inputs if TOKENS in port.links}
            for node in editor.calls(EMBEDDING):
                place = f"{name}: {node.name}"
                table = node.args[0]
                assert isinstance(table, Node)
                if not _is_of_tokens(node.args[1], inputs):
                    log.refused(place, "its indices are not the tokens of an input")
                elif not editor.is_weight(table):
                    log.refused(place, f"its table is {shown(table)}, no parameter")
                elif not editor.tensor(table).dtype.is_floating_point:
                    log.refused(place, f"its table is {editor.tensor(table).dtype} already")
                else:
                    lookups.setdefault(storage_identity(editor.tensor(table)), []).append((name, node))
        changed: set[str] = set()
        for storage, found in lookups.items():
            first_method, first = found[0]
            table = editors[first_method].tensor(first.all_input_nodes[0])
            name = editors[first_method].tensor_name(first.all_input_nodes[0]) or first.name
            reason = self._obstacle(table, list(_others(editors, storage, {node for _, node in found})))
            if reason is not None:
                log.refused(name, reason)
            elif log.match(name):
                for method, node in found:
                    self._quantize(editors[method], node, name)
                changed |= {method for method, _ in found}
        return program.with_exported({name: editors[name].finish() for name in editors if name in changed})

    def _obstacle(self, table: Tensor, others: list[str]) -> str | None:
        width = table.shape[1]
        group = width if self.group is None else self.group
        if group < 1 or width % group:
            return f"its rows have {width} elements, which are no multiple of group={group}"
        if self.bits == 4 and width % 2:
            return f"its rows have {width} elements, and 4 bits need an even number"
        if others and not self.untie:
            added = table.numel() * self.bits // 8 + table.shape[0] * (width // group) * 4
            return (
                f"{others[0]} uses it too, so that it would stay beside its quantized form and {added} bytes be "
                "added; untie=true accepts that"
            )
        return None

    def _quantize(self, editor: GraphEditor, node: Node, name: str) -> None:
        table, indices = node.args[:2]
        assert isinstance(table, Node)
        group = table.meta["val"].shape[1] if self.group is None else self.group
        key = self.bits, group
        data = editor.derive_weight(f"{name}_quantized", [table], partial(_data, self.bits, group), key=key)
        scales = editor.derive_weight(f"{name}_scales", [table], partial(_scales, self.bits, group), key=key)
        with editor.graph.inserting_before(node):
            rows = editor.call(torch.ops.triptych.quantized_embedding.default, data, scales, indices, like=node)
            wanted = node.meta["val"].dtype
            if rows.meta["val"].dtype != wanted:
                rows = editor.call(aten.to.dtype, rows, wanted, like=node)
        node.replace_all_uses_with(rows)
        editor.graph.erase_node(node)


def _is_of_tokens(indices: object, inputs: set[str]) -> bool:
    """True where `indices` are computed from the values, and not the size alone, of one of `inputs`."""
    waiting, seen = [indices], set()
    while waiting:
        node = waiting.pop()
        if not isinstance(node, Node) or node in seen or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.op == "placeholder" and node.name in inputs:
            return True
        seen.add(node)
        waiting += node.all_input_nodes
    return False


def _others(editors: Mapping[str, GraphEditor], storage: int, lookups: set[Node]) -> Iterator[str]:
    """Yield what else uses a table, in any method."""
    for name, editor in editors.items():
        for one in editor.graph.find_nodes(op="placeholder"):
            if editor.is_weight(one) and storage_identity(editor.tensor(one)) == storage:
                yield from (f"{name}: {shown(user)}" for user in one.users if user not in lookups)


def _scales(bits: int, group: int, table: Tensor) -> Tensor:
    """Return float32 [V, G]: what each step of a group is worth."""
    groups = table.float().unflatten(1, (-1, group))
    steps = 2 ** (bits - 1)
    scales = torch.maximum(groups.amax(-1) / (steps - 1), -groups.amin(-1) / steps)
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _data(bits: int, group: int, table: Tensor) -> Tensor:
    """Return int8 [V, D], or uint8 [V, D/2] with the earlier element of a pair in the upper half of its byte."""
    steps = 2 ** (bits - 1)
    groups = table.float().unflatten(1, (-1, group))
    values = (groups / _scales(bits, group, table).unsqueeze(-1)).round().clamp(-steps, steps - 1).flatten(1)
    if bits == 8:
        return values.to(torch.int8)
    halves = (values + steps).to(torch.uint8)
    return halves[:, ::2] * 16 + halves[:, 1::2]
