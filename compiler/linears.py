"""Linear layers over one input as one: found behind a value, held against each other, stacked.

A linear here is a call of ``aten.linear`` whose weight is a parameter, or torchao's ``dequantize_affine`` of
parameters. Linears over the same input compute rows of one matrix product, so their weights, scales, zero points and
biases stacked along the output axis give the same numbers, and slices of the result stand for the old ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Final

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.aliasing import Aliases, is_writer
from triptych.compiler.derived_weights import storage_place
from triptych.compiler.editing import GraphEditor, storage_identity
from triptych.compiler.matching import shown
from triptych.compiler.pass_kinds import MatchLog

aten = torch.ops.aten
LINEAR: Final = aten.linear.default
DEQUANTIZE: Final = "torchao.dequantize_affine.default"
QUANTIZERS: Final = frozenset({"torchao", "quantized_decomposed"})


@dataclass(frozen=True)
class Group:
    """Linears that a pass wants as one, in the order of their rows; `where` is the node that brings them together."""

    where: Node
    linears: tuple[Node, ...]


def linears_behind(
    value: Node, passes: Callable[[Node], bool], writers: Mapping[Node, Sequence[Node]] | None = None
) -> list[Node]:
    """Return the linears whose results reach `value` through nodes that `passes` lets through, in graph order.

    The search ends at each linear. `writers` says which nodes write into a placeholder: it goes on from what these
    take.
    """
    found: set[Node] = set()
    seen: set[Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is LINEAR:
            found.add(node)
        elif node.op == "placeholder":
            waiting += [used for one in (writers or {}).get(node, ()) for used in one.all_input_nodes]
        elif passes(node):
            waiting += node.all_input_nodes
    return sorted(found)


def same_value(one: Any, other: Any) -> bool:
    """True for one node, and for equal quantizations of one value: torchao gives every linear a chain of its own."""
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(same_value, one, other))
    if not isinstance(one, Node) or not isinstance(other, Node):
        return type(one) is type(other) and bool(one == other)
    if one is other:
        return True
    return (
        one.target is other.target
        and _in_chain(one)
        and same_value(one.args, other.args)
        and same_value(list(one.kwargs.items()), list(other.kwargs.items()))
    )


def _in_chain(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, OpOverload) and node.target.namespace in QUANTIZERS


def fuse(editor: GraphEditor, groups: Sequence[Group], label: str, log: MatchLog) -> None:
    """Announce and stack every group that can be stacked, and record why the others cannot.

    1. All linears of a group have the same input, and weights and biases of one format (dtype, device, blocks).
    2. A weight that anything else in the method uses would be stored twice, so its group stays. Where groups agree
       in all of their weights, in order, they share the stack.
    """
    reasons = {group: _difference(editor, group.linears) for group in groups}
    possible = [group for group in groups if reasons[group] is None]
    users = _weight_users(editor)
    reasons |= {group: _used_elsewhere(editor, group, possible, users) for group in possible}
    stacked: set[Node] = set()
    for group in groups:
        reason = reasons[group]
        if reason is None and not stacked.isdisjoint(group.linears):
            reason = "one of its linears has become part of another stack"
        if reason is not None:
            log.refused(group.where, reason)
        elif log.match(group.where):
            _stack(editor, group.linears, label)
            stacked.update(group.linears)


# ---------------------------------------------------------------------------------------------------- may they be one


def _difference(editor: GraphEditor, linears: Sequence[Node]) -> str | None:
    """Say why `linears` are no rows of one product, or None."""
    first = linears[0]
    for linear in linears[1:]:
        if not same_value(first.args[0], linear.args[0]):
            return f"{shown(first)} and {shown(linear)} have different inputs"
    for linear in linears:
        weight = linear.args[1]
        problem = _problem(editor, weight) if isinstance(weight, Node) else "is no tensor"
        if problem is not None:
            return f"the weight of {shown(linear)} {problem}"
        bias = _bias(linear)
        if bias is not None and not editor.is_weight(bias):
            return f"the bias of {shown(linear)} is no parameter"
    for place, values in (
        ("weights", [linear.args[1] for linear in linears]),
        ("biases", [bias for linear in linears if (bias := _bias(linear)) is not None]),
    ):
        formats = {_format(value): value for value in values}
        if len(formats) > 1:
            one, other = list(formats)[:2]
            return f"its {place} have different formats: {one} and {other}"
    places = [storage_place(editor.tensor(leaf)) for linear in linears for leaf in _leaves(linear)]
    if len(set(places)) < len(places):
        return "two of its linears have one weight"
    writer = _writer_between(editor, linears)
    return None if writer is None else f"between its linears {shown(writer)} writes into their input"


def _bias(linear: Node) -> Node | None:
    bias = linear.args[2] if len(linear.args) > 2 else linear.kwargs.get("bias")
    return bias if isinstance(bias, Node) else None


def _problem(editor: GraphEditor, weight: Node) -> str | None:
    """Say why rows of `weight` cannot stand beside the rows of another, or None."""
    if editor.is_weight(weight):
        return None
    if not _dequantizes(weight):
        return f"is {shown(weight)}, no parameter"
    data, block, scale = weight.args[:3]
    assert isinstance(data, Node)
    assert isinstance(scale, Node)
    assert isinstance(block, (tuple, list))
    if not all(map(editor.is_weight, weight.all_input_nodes)):
        return "is dequantized from what no parameter holds"
    if block[0] != 1 or scale.meta["val"].shape[0] != data.meta["val"].shape[0]:
        return f"is quantized in blocks {list(block)}, which lie across its rows"
    return None


def _dequantizes(node: Node) -> bool:
    """By name, because torchao, which registers the operator, need not be there."""
    return str(node.target) == DEQUANTIZE


def _format(value: Any) -> str:
    """Print a weight expression without what stacking changes: names and the number of rows."""
    if isinstance(value, Node) and value.op == "placeholder":
        tensor = value.meta["val"]
        device = "" if tensor.device.type == "cpu" else f" on {tensor.device}"
        return f"{str(tensor.dtype).removeprefix('torch.')} {['N', *tensor.shape[1:]]}{device}".replace("'", "")
    if isinstance(value, Node):
        parts = [_format(one) for one in (*value.args, *value.kwargs.values())]
        return f"{str(value.target).split('.')[1]}({', '.join(parts)})"
    return str(value)


def _leaves(linear: Node) -> list[Node]:
    """Return the placeholders that the weight of `linear` is made of."""
    weight = linear.args[1]
    assert isinstance(weight, Node)
    return [weight] if weight.op == "placeholder" else list(weight.all_input_nodes)


def _writer_between(editor: GraphEditor, linears: Sequence[Node]) -> Node | None:
    """Return a node that changes the input between the first and the last of `linears`, or None."""
    chains = {node for linear in linears for node in _chain(linear.args[0])}
    first, last = min([*linears, *filter(_in_chain, chains)]), max(linears)
    writers = [node for node in editor.graph.nodes if first < node < last and is_writer(node)]
    aliases = Aliases(editor)
    return next((node for node in writers if aliases.written_by(node) & aliases.of(*chains)), None)


def _chain(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
        if _in_chain(value):
            for used in value.all_input_nodes:
                yield from _chain(used)


def _weight_users(editor: GraphEditor) -> dict[int, set[Node]]:
    """Return storage → the nodes that compute with it; of a dequantized weight they are what uses the result."""
    users: dict[int, set[Node]] = {}
    for node in editor.graph.nodes:
        if editor.is_weight(node):
            found = users.setdefault(storage_identity(editor.tensor(node)), set())
            for user in node.users:
                found |= set(user.users) if _dequantizes(user) else {user}
    return users


def _used_elsewhere(
    editor: GraphEditor, group: Group, possible: Sequence[Group], users: Mapping[int, set[Node]]
) -> str | None:
    """Say which weight of `group` is used by what no group of the same weights stacks, or None."""
    key = _weights(editor, group)
    stacked = {linear for one in possible if _weights(editor, one) == key for linear in one.linears}
    for linear in group.linears:
        for leaf in _leaves(linear):
            others = users[storage_identity(editor.tensor(leaf))] - stacked
            if others:
                return f"{shown(min(others))} uses the weight {editor.tensor_name(leaf)} too; it would be stored twice"
    return None


def _weights(editor: GraphEditor, group: Group) -> object:
    return [storage_place(editor.tensor(leaf)) for linear in group.linears for leaf in _leaves(linear)]


# ---------------------------------------------------------------------------------------------------- make them one


def _stack(editor: GraphEditor, linears: Sequence[Node], label: str) -> None:
    first = min(linears)
    widths = [int(linear.meta["val"].shape[-1]) for linear in linears]
    with editor.graph.inserting_before(first):
        weight = _stacked(editor, [linear.args[1] for linear in linears], label, first)
        arguments = [first.args[0], weight]
        biases = [_bias(linear) for linear in linears]
        given = [bias for bias in biases if bias is not None]
        if given:
            # A linear without a bias among others gets zeros, which change no sum.
            sizes = tuple(width if bias is None else None for width, bias in zip(widths, biases, strict=True))
            name = _stacked_name(editor, given, label)
            arguments.append(editor.derive_weight(name, given, partial(_stack_biases, sizes), key=sizes))
        whole = editor.call(LINEAR, *arguments, like=first)
        axis, start = whole.meta["val"].dim() - 1, 0
        pieces = []
        for linear, width in zip(linears, widths, strict=True):
            pieces.append(editor.call(aten.slice.Tensor, whole, axis, start, start + width, like=linear))
            start += width
    for linear, piece in zip(linears, pieces, strict=True):
        linear.replace_all_uses_with(piece)
        editor.graph.erase_node(linear)
    editor.refresh_after(*pieces)


def _stacked(editor: GraphEditor, parts: Sequence[Any], label: str, like: Node) -> Any:
    """Return the expression that all of `parts` are, over stacked weights."""
    one = parts[0]
    if not isinstance(one, Node):
        return one
    if one.op == "placeholder":
        return editor.derive_weight(_stacked_name(editor, parts, label), parts, _concatenate)
    assert callable(one.target)
    arguments = [_stacked(editor, same, label, like) for same in zip(*(part.args for part in parts), strict=True)]
    named = {key: _stacked(editor, [part.kwargs[key] for part in parts], label, like) for key in one.kwargs}
    return editor.call(one.target, *arguments, like=like, **named)


def _concatenate(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


def _stack_biases(zeros: Sequence[int | None], *given: Tensor) -> Tensor:
    left = iter(given)
    like = given[0]
    return torch.cat([next(left) if size is None else like.new_zeros(size) for size in zeros])


def _stacked_name(editor: GraphEditor, parts: Sequence[Node], label: str) -> str:
    """Put `label` in the place where the names differ: attn.q.weight and attn.k.weight give attn.<label>.weight."""
    names = [(editor.tensor_name(part) or part.name).split(".") for part in parts]
    head = _common_start(names)
    tail = _common_start([name[len(head) :][::-1] for name in names])[::-1]
    return ".".join([*head, label, *tail])


def _common_start(names: Sequence[Sequence[str]]) -> list[str]:
    return [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False))]
