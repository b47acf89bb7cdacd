"""The matcher of rewrite rules: finds a pattern in a captured graph, operand by operand from the results upwards.

It is our own: torch.fx's `SubgraphMatcher` keeps the bindings of a branch it gave up, knows neither commutative
operators nor kinds of wildcards, spells defaults out only where the counts of arguments differ, and gives no reason
where it finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from triptych.compiler.pattern import Pattern, equal, operands
from triptych.compiler.provenance import source_line
from triptych.errors import VerificationError

# Arguments that say how to compute and not what: a pattern that leaves them out takes any value.
HOW: Final = frozenset({"cudnn_enable", "cudnn_enabled", "pin_memory"})


_aten = torch.ops.aten
COMMUTATIVE: Final = frozenset(
    {
        _aten.add.Tensor,  # where alpha is 1
        _aten.mul.Tensor,
        _aten.maximum.default,
        _aten.minimum.default,
        _aten.eq.Tensor,
        _aten.ne.Tensor,
        _aten.logical_and.default,
        _aten.logical_or.default,
        _aten.logical_xor.default,
        _aten.bitwise_and.Tensor,
        _aten.bitwise_or.Tensor,
        _aten.bitwise_xor.Tensor,
    }
)

Bound = Mapping[Node, Any]
"""Node of the pattern → node or literal of the graph; a variadic parameter → tuple of these."""


def calls(node: Any, target: Any) -> bool:
    """True where `node` calls `target`, an operator or any overload of a packet."""
    if not isinstance(node, Node) or node.op != "call_function":
        return False
    if isinstance(target, OpOverloadPacket):
        return isinstance(node.target, OpOverload) and node.target.overloadpacket is target
    return node.target is target


def shown(value: Any) -> str:
    """Return `value` for a message: nodes by operator, name and source line, literals as they print."""
    if isinstance(value, Node):
        line = source_line(value)
        if value.op != "call_function":
            return f"%{value.name}"
        name = value.target if isinstance(value.target, OpOverload) else getattr(value.target, "__name__", value.target)
        return f"{name} (%{value.name}{f', {line}' if line else ''})"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)


@dataclass(frozen=True)
class Failure:
    """How far an attempt came: why it failed, and the operators matched until then as (pattern's, graph's node)."""

    reason: str
    matched: tuple[tuple[Node, Node], ...]


class Matcher:
    """Looks for a pattern at one anchor after another.

    `nodes` lists the nodes that may be matched; `taken` says why one of them may not be, or returns None.
    """

    def __init__(self, pattern: Pattern, nodes: Sequence[Node], taken: Callable[[Node], str | None]) -> None:
        self._pattern = pattern
        self._nodes = nodes
        self._taken = taken
        self._parameters = {one.node: one for one in pattern.parameters}
        self.failure: Failure | None = None

    def match(self, anchor: Node) -> Iterator[Bound]:
        """Yield every way in which the pattern fits with its first output at `anchor`.

        Afterwards `failure` is the failed attempt that matched most operators, or None where there was none.
        """
        self.failure = None
        for bound in self._call(self._pattern.outputs[0], anchor, "result 0 of the pattern", {}):
            yield from self._outputs(1, bound)

    def _outputs(self, index: int, bound: Bound) -> Iterator[Bound]:
        if index == len(self._pattern.outputs):
            yield bound
            return
        wanted = self._pattern.outputs[index]
        if wanted in bound:
            yield from self._outputs(index + 1, bound)
            return
        place = f"result {index} of the pattern"
        candidates = self._candidates(wanted, bound)
        if not candidates:
            self._fail(bound, f"{wanted.target} expected as {place}, and there is no other over the same operands")
        for candidate in candidates:
            for extended in self._call(wanted, candidate, place, bound):
                yield from self._outputs(index + 1, extended)

    def _candidates(self, wanted: Node, bound: Bound) -> list[Node]:
        """Users of an operand that is bound already; where there is none, every node with the target."""
        pool: Sequence[Node] = self._nodes
        for operand in wanted.all_input_nodes:
            if isinstance(bound.get(operand), Node):
                pool = sorted(bound[operand].users)
                break
        matched = _matched(bound)
        return [node for node in pool if calls(node, wanted.target) and all(node is not one for _, one in matched)]

    def _call(self, wanted: Node, found: Any, where: str, bound: Bound) -> Iterator[Bound]:
        if not calls(found, wanted.target):
            self._fail(bound, f"{wanted.target} expected as {where}, found {shown(found)}")
            return
        taken = self._taken(found)
        if taken is not None or any(one is found for _, one in _matched(bound)):
            self._fail(bound, f"{where} is {shown(found)}, which {taken or 'stands for another node of the pattern'}")
            return
        bound = {**bound, wanted: found}
        try:
            expected = operands(wanted, found.target)
        except VerificationError as error:
            self._fail(bound, str(error))
            return
        given = operands(found, found.target)
        spelled = operands(wanted, found.target, defaults=False)
        for order in _orders(found.target, given):
            pairs = [
                (value, given[other], f"operand {index} ({name}) of {found.target} (%{found.name})")
                for index, ((name, value), other) in enumerate(zip(expected.items(), order, strict=True))
                if name not in HOW or name in spelled
            ]
            yield from self._all(pairs, bound)

    def _all(self, pairs: Sequence[tuple[Any, Any, str]], bound: Bound) -> Iterator[Bound]:
        if not pairs:
            yield bound
            return
        for extended in self._value(*pairs[0], bound):
            yield from self._all(pairs[1:], extended)

    def _value(self, wanted: Any, found: Any, where: str, bound: Bound) -> Iterator[Bound]:
        if isinstance(wanted, (tuple, list)):
            yield from self._items(wanted, found, where, bound)
        elif not isinstance(wanted, Node):
            if equal(wanted, found):
                yield bound
            else:
                self._fail(bound, f"{where} is {shown(found)}, the pattern has {shown(wanted)}")
        elif wanted in bound:
            if equal(bound[wanted], found):
                yield bound
            else:
                self._fail(bound, f"{where} is {shown(found)}, the pattern wants {shown(bound[wanted])} again")
        elif wanted not in self._parameters:
            yield from self._call(wanted, found, where, bound)
        elif self._parameters[wanted].fits(found):
            yield {**bound, wanted: found}
        else:
            self._fail(bound, f"{where} is {shown(found)}, the pattern takes {self._parameters[wanted]}")

    def _items(self, wanted: Sequence[Any], found: Any, where: str, bound: Bound) -> Iterator[Bound]:
        """Match a list item by item; a variadic parameter takes the items that the others leave."""
        rest = next((one.node for one in self._pattern.parameters if one.variadic and one.node in wanted), None)
        least = len(wanted) - (rest is not None)
        if not isinstance(found, (tuple, list)) or len(found) < least or (rest is None and len(found) > least):
            count = f"{least}{' or more' if rest else ''}"
            self._fail(bound, f"{where} is {shown(found)}, the pattern has a list of {count}")
            return
        items: list[Any] = list(found)
        if rest is not None:
            start = list(wanted).index(rest)
            spare = slice(start, start + len(found) - least)
            items[spare] = [tuple(items[spare])]
        places = [f"item {index} of {where}" for index in range(len(items))]
        yield from self._all(list(zip(wanted, items, places, strict=True)), bound)

    def _fail(self, bound: Bound, reason: str) -> None:
        matched = _matched(bound)
        if self.failure is None or len(matched) > len(self.failure.matched):
            self.failure = Failure(reason, matched)


def _matched(bound: Bound) -> tuple[tuple[Node, Node], ...]:
    return tuple((one, found) for one, found in bound.items() if one.op == "call_function")


def _orders(target: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the orders in which the operands of a call may be read; names beyond the first two stay."""
    names = tuple(given)
    yield names
    if target in COMMUTATIVE and given.get("alpha", 1) == 1:
        yield (names[1], names[0], *names[2:])
