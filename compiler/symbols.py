"""Symbolic sizes of two exported programs in one environment.

Every `ExportedProgram` has symbols, ranges and fake tensors of its own. `Dimensions` says what each symbol of one
program is in terms of another's, and puts the values of both into a fresh environment, without running an operator
again. A fresh one, because lowering leaves symbols behind in the environment of what it lowers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import sympy  # type: ignore[import-untyped]
import torch
from torch import SymBool, SymFloat, SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.symbol import SymT, make_symbol
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy
from torch.utils._traceback import CapturedTraceback

from triptych.errors import VerificationError

SymbolMap = Mapping[sympy.Symbol, sympy.Expr]
UNCHANGED: Final[SymbolMap] = {}


class Dimensions:
    """Sizes of `producer` and `consumer` in one environment, where the consumer's symbols keep their names.

    First `unify` what meets, then `settle`; values can be moved afterwards.
    """

    def __init__(self, producer: ExportedProgram, consumer: ExportedProgram) -> None:
        self._producer = producer
        self._consumer = consumer
        self._environment = ShapeEnv(assume_static_by_default=True)
        self._mode = FakeTensorMode(
            allow_fallback_kernels=False, allow_non_fake_inputs=True, shape_env=self._environment
        )
        self.range_constraints = dict(consumer.range_constraints)
        self.producers: dict[sympy.Symbol, sympy.Expr] = {}
        """What each symbol of the producer is in the consumer's."""

    def unify(self, where: str, produced: Tensor, taken: Tensor) -> None:
        """Let the sizes of `produced`, a value of the producer, be those of `taken`, one of the consumer.

        A dynamic size may become another dynamic size or a fixed one. Raises `VerificationError` naming `where` for
        sizes that differ, for a fixed size where any is taken, and where the ranges have nothing in common.
        """
        for axis, (size, wanted) in enumerate(zip(_sizes(produced), _sizes(taken), strict=True)):
            place = f"{where}, axis {axis}"
            if not isinstance(size, int):
                expression = sympy.Integer(wanted) if isinstance(wanted, int) else wanted.node.expr
                self._unify(place, size.node.expr, expression)
            elif str(size) != str(wanted):
                text = wanted if isinstance(wanted, int) else "a dynamic number ({} to {})".format(*self.bounds(wanted))
                raise VerificationError(f"{place}: {size} is produced, {text} is taken")

    def _unify(self, place: str, produced: sympy.Expr, wanted: sympy.Expr) -> None:
        known = produced.xreplace(self.producers)
        is_known = produced.free_symbols <= self.producers.keys()
        if is_known and known == wanted:
            return
        if not isinstance(produced, sympy.Symbol) or is_known:
            raise VerificationError(f"{place}: {known} is produced, {wanted} is taken; these are not always equal")
        ours = self._producer.range_constraints.get(produced, ValueRanges(0, sympy.oo))
        theirs = bound_sympy(wanted, self.range_constraints)
        lower, upper = max(ours.lower, theirs.lower), min(ours.upper, theirs.upper)
        if lower > upper:
            raise VerificationError(
                f"{place}: {ours.lower} to {ours.upper} is produced, {theirs.lower} to {theirs.upper} is taken"
            )
        if isinstance(wanted, sympy.Symbol):
            self.range_constraints[wanted] = ValueRanges(lower, upper)
        elif (lower, upper) != (theirs.lower, theirs.upper):
            raise VerificationError(f"{place}: {wanted} is taken, and only {ours.lower} to {ours.upper} is produced")
        self.producers[produced] = wanted

    def settle(self) -> None:
        """Bring every symbol of both programs into the environment; those of the producer alone get new names."""
        taken = {str(symbol) for symbol in _symbols(self._consumer)}
        for symbol in _symbols(self._consumer):
            self._adopt(symbol, symbol, self._consumer)
        for symbol in _symbols(self._producer):
            if symbol in self.producers:
                continue
            kind = SymT.SIZE if symbol in _environment(self._producer).backed_var_to_val else SymT.UNBACKED_INT
            options = {"integer": True, **({"positive": True} if kind is SymT.SIZE else {})}
            candidates = (make_symbol(kind, number, **options) for number in range(len(taken) + 1))
            new = next(one for one in candidates if str(one) not in taken)
            taken.add(str(new))
            self.producers[symbol] = new
            self._adopt(symbol, new, self._producer)
            if symbol in self._producer.range_constraints:
                self.range_constraints[new] = self._producer.range_constraints[symbol]
        for exported, symbols in ((self._consumer, UNCHANGED), (self._producer, self.producers)):
            own = set(_symbols(exported))
            for asserts in _environment(exported).deferred_runtime_asserts.values():
                for one in asserts:
                    if one.expr.free_symbols <= own:  # the others belong to a lowering of the same program
                        self._environment.guard_or_defer_runtime_assert(one.expr.xreplace(symbols), str(one.msg))
        self._environment.freeze()

    def _adopt(self, symbol: sympy.Symbol, new: sympy.Symbol, exported: ExportedProgram) -> None:
        own, environment = _environment(exported), self._environment
        if symbol in own.backed_var_to_val:
            environment.add_backed_var_to_val(new, int(own.backed_var_to_val[symbol]))
        else:
            number = int(re.sub(r"\D", "", str(new)) or 0)
            environment.unbacked_symint_counter = max(environment.unbacked_symint_counter, number + 1)
        environment.var_to_stack[new] = CapturedTraceback.extract(skip=1)
        if symbol in own.var_to_range:
            known = own.var_to_range[symbol]
            environment.constrain_symbol_range(new, compiler_min=known.lower, compiler_max=known.upper)
        if symbol in own.size_like:
            environment.size_like.add(new)

    def bounds(self, size: SymInt) -> tuple[int, int]:
        """Return the least and the largest value of a size in the consumer's symbols."""
        found = bound_sympy(size.node.expr, self.range_constraints)
        return int(found.lower), int(found.upper)

    def moved(self, value: Any, symbols: SymbolMap) -> Any:
        """Return a fake value, structures included, in the environment; `symbols` says what each symbol becomes."""
        return pytree.tree_map(lambda one: self._moved_leaf(one, symbols), value)

    def _moved_leaf(self, value: Any, symbols: SymbolMap) -> Any:
        if isinstance(value, Tensor):
            sizes, strides = ([self._moved_leaf(size, symbols) for size in part] for part in _layout(value))
            with self._mode:
                return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        if not isinstance(value, (SymInt, SymFloat, SymBool)):
            return value
        expression = value.node.expr.xreplace(symbols)
        if expression.is_Integer:
            return int(expression)
        if expression in (sympy.true, sympy.false):
            return bool(expression)
        if isinstance(value, SymBool):
            return self._environment.create_symboolnode(expression)
        if isinstance(value, SymFloat):
            return self._environment.create_symfloatnode(expression, hint=None)
        known = expression.xreplace(self._environment.backed_var_to_val)
        return self._environment.create_symintnode(expression, hint=int(known) if known.is_Integer else None)

    def moved_meta(self, meta: Mapping[str, Any], symbols: SymbolMap) -> dict[str, Any]:
        """Return a node's metadata with its value in the environment."""
        moved = {key: value for key, value in meta.items() if key != "tensor_meta"}
        if "val" in meta:
            moved["val"] = self.moved(meta["val"], symbols)
        if "unbacked_bindings" in meta:
            moved["unbacked_bindings"] = {
                symbols.get(old, old): path for old, path in meta["unbacked_bindings"].items()
            }
        return moved

    def moved_module(self, module: GraphModule, symbols: SymbolMap) -> GraphModule:
        """Return a copy of the graph of a branch, and of those inside it, with its values in the environment."""
        root = torch.nn.Module()
        for name, child in module.named_children():
            root.add_module(name, self.moved_module(child, symbols) if isinstance(child, GraphModule) else child)
        graph = torch.fx.Graph()
        mapping: dict[torch.fx.Node, torch.fx.Node] = {}
        for node in module.graph.nodes:
            mapping[node] = graph.node_copy(node, lambda used: mapping[used])
            mapping[node].meta = self.moved_meta(node.meta, symbols)
        return GraphModule(root, graph)


def _sizes(value: Tensor) -> tuple[Any, ...]:
    return tuple(value.shape)


def _layout(value: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(value.shape), tuple(value.stride())


def _symbols(exported: ExportedProgram) -> list[sympy.Symbol]:
    """Return the symbols of a program, inputs and branches included, in the order they appear."""
    found: dict[sympy.Symbol, None] = {}
    for graph_module in exported.graph_module.modules():
        for node in graph_module.graph.nodes if isinstance(graph_module, GraphModule) else ():
            for value in pytree.tree_leaves(node.meta.get("val")):
                found.update(dict.fromkeys(_symbols_of(value)))
    return list(found)


def _symbols_of(value: object) -> Iterator[sympy.Symbol]:
    if isinstance(value, Tensor):
        for part in _layout(value):
            for size in part:
                yield from _symbols_of(size)
    elif isinstance(value, (SymInt, SymFloat, SymBool)):
        yield from sorted(value.node.expr.free_symbols, key=str)


def _environment(exported: ExportedProgram) -> ShapeEnv:
    for node in exported.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, FakeTensor) and value.fake_mode.shape_env is not None:
                return value.fake_mode.shape_env
    raise VerificationError("a method has no values with shapes; compose methods as they were captured")
