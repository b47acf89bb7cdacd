"""``merge-lora``: low-rank adapters become part of the weights that they adapt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.aliasing import Aliases
from triptych.compiler.constants import QUANTIZERS
from triptych.compiler.editing import GraphEditor, storage_identity
from triptych.compiler.layout import CASTS, argument
from triptych.compiler.matching import shown
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method

aten = torch.ops.aten
LINEAR: Final = aten.linear.default
SEPARATOR: Final = "+"


@dataclass(frozen=True)
class MergeLoRA(GraphPass):
    """Replace ``linear(x, W, b) + s·linear(linear(x, A), B)`` by ``linear(x, W + s·B·A, b)``.

    Low-rank adaptation: Hu et al., arXiv:2106.09685.

    1. The computation is what counts, whichever library wrote the module: the scale may stand before, between or
       behind the adapter's linears, as a number, a division or a tensor of one element; casts and inactive dropout may
       stand anywhere; the sum goes either way around. Several adapters of one linear are merged one after the other.
    2. W + s·B·A is computed in float64 and rounded to the dtype of W, once for all methods that share W, A and B.
    3. `methods` names the methods to merge in, joined by "+": ``merge-lora{methods=prefill}`` keeps the adapters in
       decode, which then go on using W. Without it all methods are merged.
    4. Left alone are adapters with biases, active dropout, quantized weights (merge before quantizing), and a W that
       something else in the method uses, which would be stored twice.
    """

    name: ClassVar[str] = "merge-lora"

    methods: str = ""

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Merge every adapter of the method."""
        is_chosen = not self.methods or log.method in self.methods.split(SEPARATOR)
        for node in editor.calls(aten.add.Tensor):
            adapter = _adapter(editor, node)
            if adapter is None:
                continue
            reason = _obstacle(editor, adapter) if is_chosen else f"methods={self.methods} leaves {log.method} as it is"
            if reason is not None:
                log.refused(node, reason)
            elif log.match(node):
                _merge(editor, adapter)


@dataclass(frozen=True)
class _Path:
    """How a value goes into an operand: from `source` through casts, dropout and multiplications by `factor`."""

    source: Node
    factor: float
    passed: tuple[Node, ...]


@dataclass(frozen=True)
class _Adapter:
    """The sum, the linear that is adapted, the adapter's linears, and the paths behind, between and before these."""

    total: Node
    base: Node
    down: Node
    up: Node
    paths: tuple[_Path, _Path, _Path]

    @property
    def scale(self) -> float:
        """The product of all factors on the way."""
        behind, between, before = self.paths
        return behind.factor * between.factor * before.factor


def _adapter(editor: GraphEditor, total: Node) -> _Adapter | None:
    """Return the adapter whose result `total` adds to a linear's, or None where it adds something else."""
    for base, delta, alpha in _summands(total):
        if base.target is not LINEAR:
            continue
        # A linear on a path ends it, so the first one behind the sum is the adapter's second.
        behind = _path(editor, delta, alpha)
        if behind.source.target is not LINEAR or behind.source is base:
            continue
        between = _path(editor, behind.source.args[0])
        if between.source.target is not LINEAR:
            continue
        before = _path(editor, between.source.args[0], until=base.args[0])
        return _Adapter(total, base, between.source, behind.source, (behind, between, before))
    return None


def _summands(total: Node) -> Iterator[tuple[Node, Node, float]]:
    first, second = total.args[:2]
    alpha = total.kwargs.get("alpha", 1)
    if not isinstance(first, Node) or not isinstance(second, Node) or not isinstance(alpha, (int, float)):
        return
    yield _path_of_casts(first), second, float(alpha)
    if alpha == 1:
        yield _path_of_casts(second), first, 1.0


def _path_of_casts(node: Node) -> Node:
    while node.target in CASTS:
        node = node.all_input_nodes[0]
    return node


def _path(editor: GraphEditor, value: Any, factor: float = 1.0, until: Any = None) -> _Path:
    """Go back from `value` through what only scales it, but not beyond `until`."""
    assert isinstance(value, Node)
    passed: list[Node] = []
    while value is not until:
        scaled = _scaled(editor, value)
        if scaled is None:
            break
        passed.append(value)
        value, factor = scaled[0], factor * scaled[1]
    return _Path(value, factor, tuple(passed))


def _scaled(editor: GraphEditor, node: Node) -> tuple[Node, float] | None:
    """Return the operand and the factor where `node` does no more than scale a value."""
    if node.target in CASTS or node.target is aten.dropout.default or _quantizes(node):
        return node.all_input_nodes[0], 1.0
    if node.target not in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        return None
    first, second = node.args[:2]
    is_division = node.target in (aten.div.Tensor, aten.div.Scalar)
    factor = _number(editor, second)
    if isinstance(first, Node) and factor is not None:
        return first, (1 / factor if is_division else factor)
    factor = _number(editor, first)
    if isinstance(second, Node) and factor is not None and not is_division:
        return second, factor
    return None


def _quantizes(node: Node) -> bool:
    """True for the rounding of activations, which has to be looked through to see, and refuse, a quantized adapter."""
    return isinstance(node.target, OpOverload) and node.target.namespace in QUANTIZERS


def _number(editor: GraphEditor, value: Any) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Node) and editor.is_weight(value) and editor.tensor(value).numel() == 1:
        return float(editor.tensor(value))
    return None


def _obstacle(editor: GraphEditor, adapter: _Adapter) -> str | None:
    """Say why an adapter cannot be merged, or None."""
    base, up, down = adapter.base, adapter.up, adapter.down
    for role, linear in (("adapted linear", base), ("adapter", up), ("adapter", down)):
        weight = linear.args[1]
        if not isinstance(weight, Node) or not editor.is_weight(weight):
            return f"the weight of the {role} is {shown(weight)}, no parameter; merge before quantizing"
        if not editor.tensor(weight).dtype.is_floating_point:
            return f"the weight of the {role} is {editor.tensor(weight).dtype}; merge before quantizing"
    for linear in (up, down):
        if argument(linear, "bias") is not None:
            return f"{shown(linear)} of the adapter has a bias"
    for node in (one for path in adapter.paths for one in path.passed):
        if _quantizes(node):
            return f"{shown(node)} rounds its activations; merge before quantizing"
        if node.target is aten.dropout.default and argument(node, "train") and argument(node, "p"):
            return f"dropout with p={argument(node, 'p')} is active; put the model in evaluation mode"
    value = base.args[0]
    assert isinstance(value, Node)
    if _path_of_casts(adapter.paths[2].source) is not _path_of_casts(value):
        return f"the adapter reads {shown(adapter.paths[2].source)}, the linear {shown(value)}"
    if adapter.total.meta["val"].shape != base.meta["val"].shape:
        return "the sum broadcasts the linear's result"
    return _shared(editor, adapter) or _written(editor, value)


def _shared(editor: GraphEditor, adapter: _Adapter) -> str | None:
    """Say what else uses the weight of the adapted linear or its result, or None."""
    weight = adapter.base.args[1]
    assert isinstance(weight, Node)
    tensor = editor.tensor(weight)
    for one in editor.graph.find_nodes(op="placeholder"):
        if editor.is_weight(one) and storage_identity(editor.tensor(one)) == storage_identity(tensor):
            for user in one.users:
                if user is not adapter.base:
                    return f"{shown(user)} uses the weight too; merging would store {tensor.nbytes} bytes more"
    node = adapter.base
    while node is not adapter.total:
        for user in node.users:
            if user is not adapter.total and user.target not in CASTS:
                return f"{shown(user)} uses the result without the adapter"
        if len(node.users) > 1:
            return f"{shown(node)} is used in several ways"
        (node,) = node.users
    return None


def _written(editor: GraphEditor, value: Node) -> str | None:
    aliases = Aliases(editor)
    if aliases.of(value) & aliases.of_writes(editor.graph.nodes):
        return f"{shown(value)}, which both read, is written in place"
    return None


def _merge(editor: GraphEditor, adapter: _Adapter) -> None:
    weight, down, up = (linear.args[1] for linear in (adapter.base, adapter.down, adapter.up))
    assert isinstance(weight, Node)
    assert isinstance(down, Node)
    assert isinstance(up, Node)
    owner = (editor.tensor_name(weight) or weight.name).rpartition(".")[0]
    name = f"{owner}.merged_weight" if owner else "merged_weight"
    scale = adapter.scale
    merged = editor.derive_weight(name, [weight, down, up], partial(_merged, scale), key=scale)
    total, base = adapter.total, adapter.base
    with editor.graph.inserting_before(total):
        result = editor.call(LINEAR, base.args[0], merged, *base.args[2:], like=base, **base.kwargs)
        wanted = total.meta["val"].dtype
        if result.meta["val"].dtype != wanted:
            result = editor.call(aten.to.dtype, result, wanted, like=total)
    total.replace_all_uses_with(result)
    editor.graph.erase_node(total)


def _merged(scale: float, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return (weight.double() + scale * (up.double() @ down.double())).to(weight.dtype)
