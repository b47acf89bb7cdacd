"""Patterns of rewrite rules: a method traced into the operators to look for, and the values that may be bound.

`trace_pattern` runs a rule's `pattern` method over torch.fx proxies. Its parameters become placeholders, the
wildcards; operators become calls; whatever else torch could trace is refused where it is written.
"""

from __future__ import annotations

import inspect
import math
import operator
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.overrides import TorchFunctionMode

from triptych.errors import VerificationError


@dataclass(frozen=True)
class Parameter:
    """A wildcard: what it is called, the pattern node that stands for it, and the kind of value it takes."""

    name: str
    node: Node
    kind: Any
    variadic: bool = False
    keyword_only: bool = False

    def fits(self, value: Any) -> bool:
        """True where the wildcard takes `value`, a node or a literal of a graph, or a tuple where it is variadic."""
        return all(fits(self.kind, item) for item in value) if self.variadic else fits(self.kind, value)

    def __str__(self) -> str:
        kind = self.kind.__name__ if isinstance(self.kind, type) else str(self.kind)
        return f"{'*' if self.variadic else ''}{self.name}: {kind}"


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its wildcards, and what the method returned, one node or a tuple of them."""

    parameters: tuple[Parameter, ...]
    outputs: tuple[Node, ...]
    returns_tuple: bool

    @property
    def calls(self) -> tuple[Node, ...]:
        """The nodes that call an operator, in order."""
        return tuple(node for node in self.outputs[0].graph.nodes if node.op == "call_function")


# ---------------------------------------------------------------------------------------------------- patterns


def trace_pattern(function: Callable[..., Any], rule: str) -> Pattern:
    """Trace the bound method `pattern` of the rule called `rule`.

    Raises `VerificationError` for anything a pattern cannot hold: calls that are no operators, parameters that are
    not used or whose annotation says no kind, operators that lead to no output, or arguments an operator has not.
    """
    tracer = _PatternTracer(rule)
    parameters = tuple(_parameters(function, tracer.graph, rule))
    given = [Proxy(one.node, tracer) for one in parameters if not one.keyword_only]
    named = {one.name: Proxy(one.node, tracer) for one in parameters if one.keyword_only}
    try:
        with _OperatorsOnly(tracer):
            returned = function(*given, **named)
    except VerificationError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _error(rule, f"the pattern cannot be traced: {reason}; write operators and literals only") from error
    values = returned if isinstance(returned, (tuple, list)) else (returned,)
    for value in values:
        if not isinstance(value, Proxy) or value.node.op != "call_function":
            shown = f"its parameter {value.node.name}" if isinstance(value, Proxy) else repr(value)
            raise _error(rule, f"the pattern returns {shown}; return what an operator gave, or a tuple of such")
    pattern = Pattern(parameters, tuple(one.node for one in values), isinstance(returned, (tuple, list)))
    _check(pattern, rule)
    return pattern


class _PatternTracer(GraphAppendingTracer):
    """Records operators and takes results apart; refuses everything else where it is written."""

    def __init__(self, rule: str) -> None:
        super().__init__(Graph())
        self.rule = rule

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Add a node, if the graph of a capture could hold it."""
        is_operator = isinstance(target, (OpOverload, OpOverloadPacket))
        if kind != "call_function" or not (is_operator or target is operator.getitem):
            raise _no_operator(self.rule, target)
        return super().create_node(kind, target, *args, **kwargs)


class _OperatorsOnly(TorchFunctionMode):
    """Sees the calls that have no wildcard among their arguments too, such as ``aten.arange``."""

    def __init__(self, tracer: _PatternTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, type):  # torch.device and its like make literals
            return func(*args, **(kwargs or {}))
        return self.tracer.create_proxy("call_function", func, args, kwargs or {})


def _parameters(function: Callable[..., Any], graph: Graph, rule: str) -> Iterator[Parameter]:
    try:
        kinds = typing.get_type_hints(function)
    except NameError as error:
        raise _error(
            rule, f"an annotation of the pattern means nothing here ({error}); import it at run time"
        ) from error
    for name, one in inspect.signature(function).parameters.items():
        if one.kind is inspect.Parameter.VAR_KEYWORD:
            raise _error(rule, f"the pattern takes **{name}; name each wildcard")
        kind = kinds.get(name, Any)
        if not _is_kind(kind):
            raise _error(
                rule,
                f"parameter {name} of the pattern is annotated {kind}; annotate Tensor, int, float, bool, str, a list "
                "or union of these, or nothing",
            )
        variadic = one.kind is inspect.Parameter.VAR_POSITIONAL
        keyword_only = one.kind is inspect.Parameter.KEYWORD_ONLY
        yield Parameter(name, graph.placeholder(name), kind, variadic, keyword_only)


def _check(pattern: Pattern, rule: str) -> None:
    used: set[Node] = set()
    pending = list(pattern.outputs)
    while pending:
        node = pending.pop()
        if node not in used:
            used.add(node)
            pending += node.all_input_nodes
    for node in pattern.calls:
        if node not in used:
            raise _error(rule, f"the pattern calls {node.target} and returns nothing of it; return its result too")
        try:
            operands(node, node.target)
        except VerificationError as error:
            raise _error(rule, f"in the pattern {error}") from error
        source = node.args[0] if node.target is operator.getitem else None
        if isinstance(source, Node) and not _has_parts(source):
            raise _error(rule, f"the pattern indexes {source.name}, which is no list; write torch.ops.aten.select.int")
    for one in pattern.parameters:
        if one.node not in used:
            raise _error(rule, f"the pattern does not use its parameter {one.name}, so nothing can be bound to it")
        if one.variadic and any(one.node in (*user.args, *user.kwargs.values()) for user in one.node.users):
            raise _error(rule, f"the pattern uses *{one.name} as one value; use it in a list: [first, *{one.name}]")


def _has_parts(node: Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return node.op == "call_function" and isinstance(node.target, OpOverloadPacket)
    returns = node.target._schema.returns
    return len(returns) > 1 or any("List" in str(one.type) for one in returns)


def _no_operator(rule: str, target: Any) -> VerificationError:
    name = str(getattr(target, "__name__", target)).strip("_")
    known = f"torch.ops.aten.{name}" if hasattr(torch.ops.aten, name) else "torch.ops.aten.…"
    return _error(rule, f"the pattern calls {name}, which is no operator of a captured graph; write {known}")


def _error(rule: str, message: str) -> VerificationError:
    return VerificationError(f"rule {rule}: {message}")


# ---------------------------------------------------------------------------------------------------- values


def _is_kind(kind: Any) -> bool:
    if kind is Any or kind is None or isinstance(kind, type):
        return True
    if typing.get_origin(kind) in (typing.Union, types.UnionType, list, tuple):
        return all(one is ... or _is_kind(one) for one in typing.get_args(kind))
    return False


def fits(kind: Any, value: Any) -> bool:
    """True where `value`, a node or a literal of the graph, is of `kind`, an annotation of a pattern's parameter.

    Nodes of symbolic integers are integers, integers are floats, and booleans are neither.
    """
    if isinstance(value, Node):
        value = value.meta.get("val")
        if isinstance(value, (tuple, list)) or value is None:
            return False
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(one, value) for one in typing.get_args(kind))
    if origin in (list, tuple):
        items = [one for one in typing.get_args(kind) if one is not ...]
        return isinstance(value, (list, tuple)) and all(any(fits(one, item) for one in items) for item in value)
    if kind is Any or kind is object:
        return True
    if kind in (list, tuple):
        return isinstance(value, (list, tuple))
    if kind is None:
        return value is None
    if kind in (int, float) and not isinstance(value, bool):
        symbolic = (torch.SymInt,) if kind is int else (torch.SymInt, torch.SymFloat, int)
        return isinstance(value, (kind, *symbolic))
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def equal(wanted: Any, found: Any) -> bool:
    """True where two operands are the same node, or literals of equal value; 1 equals 1.0, and True equals neither."""
    if isinstance(wanted, Node) or isinstance(found, Node):
        return wanted is found
    if isinstance(wanted, (tuple, list)) and isinstance(found, (tuple, list)):
        return len(wanted) == len(found) and all(map(equal, wanted, found))
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    if isinstance(wanted, float) and isinstance(found, float) and math.isnan(wanted):
        return math.isnan(found)
    return bool(wanted == found)


def operands(node: Node, target: Any, *, defaults: bool = True) -> dict[str, Any]:
    """Return `node`'s operands by the names in the schema of `target`, with `defaults` spelled out.

    Raises `VerificationError` where the schema has no place for an operand, or one that it needs is missing.
    """
    if not isinstance(target, OpOverload):
        return {f"{index}": value for index, value in enumerate(node.args)} | dict(node.kwargs)
    given = list(node.args)
    named = dict(node.kwargs)
    values: dict[str, Any] = {}
    for argument in target._schema.arguments:
        if given and not argument.kwarg_only:
            values[argument.name] = given.pop(0)
        elif argument.name in named:
            values[argument.name] = named.pop(argument.name)
        elif argument.has_default_value():
            values |= {argument.name: argument.default_value} if defaults else {}
        else:
            raise VerificationError(f"{target} needs {argument.name}, and {node.name} does not give it")
    if given or named:
        raise VerificationError(f"{target} takes no {', '.join(named) or repr(given[0])}, which {node.name} gives")
    return values
