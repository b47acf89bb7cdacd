"""What one call of each method costs, read off its graph at stated sizes.

Nothing runs: shapes come from the fake values of the graph, with every dynamic dimension at the size asked for
(default: its maximum) and every size that only a run decides at its upper bound. The graph is costed as it is
written; what a target fuses afterwards is not known here.

- `flops`: as ``torch.utils.flop_counter`` counts them: 2 for each multiply-add of matrix products, convolutions
  and attention, 0 for everything else. Causal attention counts every key it is given.
- `bytes_read`, `bytes_written`: each operator reads its tensor inputs and writes its results once, without any
  cache. What lies under several elements (``expand``) is read once. Views cost nothing; operators that give a
  view where they can (``reshape``, ``to``) cost what they copy. Lookups (``embedding``, ``gather`` …) read as many
  elements as they return. In-place operators write what they change: ``triptych::update_cache`` the new rows.
- `constant_bytes`: the storages of the weights that the method uses, each once; state is none of them.
- `peak_live_bytes`: inputs and intermediate values, not weights and not state. Nodes run in graph order, a value
  lives from its node to its last use, inputs live from the start, a view keeps what it looks at alive. Several
  results of one operator live together.

A weight behind torchao's ``dequantize_affine`` is read by its users as it is stored, which is what kernels for
quantized weights do; legalized to aten, the arithmetic counts as any other. A higher-order operator costs what the
dearest of its graphs does: of ``torch.cond`` the larger branch, of a loop one round.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, field
from types import MappingProxyType
from typing import Final

import torch
from torch.fx import GraphModule, Node

from triptych.compiler.editing import bound_names
from triptych.compiler.operator_cost import OperatorCosts, Sizes, dynamic_dims
from triptych.compiler.program import Method, Program
from triptych.errors import UsageError

NO_SIZES: Final[Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True)
class MethodCost:
    """The cost of one call of one method; the module's docstring says what each number counts."""

    flops: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    constant_bytes: int = 0
    peak_live_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes moved: read and written."""
        return self.bytes_read + self.bytes_written


def method_cost(program: Program, name: str, sizes: Mapping[str, int] = NO_SIZES) -> MethodCost:
    """Return the cost of one call of the method `name`.

    `sizes` gives dynamic dimensions by name ("S"), the others stand at their maximum. Raises `UsageError` for a
    method or a dimension that does not exist, a size outside its bounds, and a tensor whose size has no bound.
    """
    method = program.methods.get(name)
    if method is None:
        raise UsageError(f"the program has no method {name!r}; its methods: {', '.join(program.methods)}")
    _check_names({name: method}, sizes)
    return _method_cost(program, name, sizes)


def program_cost(program: Program, sizes: Mapping[str, int] = NO_SIZES) -> dict[str, MethodCost]:
    """Return the cost of every method; a name in `sizes` means every method that has such a dimension.

    Raises `UsageError` as `method_cost` does.
    """
    _check_names(program.methods, sizes)
    return {name: _method_cost(program, name, sizes) for name in program.methods}


def cost_delta(before: Mapping[str, MethodCost], after: Mapping[str, MethodCost]) -> dict[str, MethodCost]:
    """Return after - before for each method of either side; a method that one side lacks costs nothing there."""

    def numbers(costs: Mapping[str, MethodCost], name: str) -> tuple[int, ...]:
        return astuple(costs.get(name, MethodCost()))

    return {
        name: MethodCost(*(new - old for old, new in zip(numbers(before, name), numbers(after, name), strict=True)))
        for name in {**before, **after}
    }


def _check_names(methods: Mapping[str, Method], sizes: Mapping[str, int]) -> None:
    known = {name: dim for method in methods.values() for name, dim in dynamic_dims(method).items()}
    for name in sizes:
        if name not in known:
            listed = ", ".join(f"{dim.name} ({dim.minimum} to {dim.maximum})" for dim in known.values()) or "none"
            raise UsageError(f"no dynamic dimension of {', '.join(methods)} is called {name!r}; known: {listed}")


def _method_cost(program: Program, name: str, sizes: Mapping[str, int]) -> MethodCost:
    exported = program.methods[name].exported
    bound = bound_names(exported)
    weights = {argument for argument, fqn in bound.items() if fqn not in program.state}
    costs = OperatorCosts(Sizes(name, program.methods[name], sizes))
    cost = _graph_cost(exported.graph_module, costs, weights, bound)
    constants = sum(weight.nbytes for weight in program.weights.values() if name in weight.users)
    return MethodCost(cost.flops, cost.bytes_read, cost.bytes_written, constants, cost.peak_live_bytes)


def _graph_cost(
    module: GraphModule, costs: OperatorCosts, weights: Collection[str], outside: Collection[str]
) -> MethodCost:
    """Add up a graph; `outside` names the placeholders whose memory is not the graph's own."""
    flops = read = written = 0
    lifetimes = _Lifetimes()
    stored = {node: costs.nbytes(node) for node in module.graph.nodes if node.name in weights}
    for position, node in enumerate(module.graph.nodes):
        for used in node.all_input_nodes:
            lifetimes.use(used, position)
        if node.op == "placeholder" and node.name not in outside:
            lifetimes.own(node, costs.nbytes(node), 0)
        elif node.op == "call_function":
            cost, base = _call_cost(node, module, costs, stored)
            flops, read, written = flops + cost.flops, read + cost.bytes_read, written + cost.bytes_written
            if base is not None:
                lifetimes.owners[node] = lifetimes.owners.get(base)
                if base in stored and node not in stored:
                    stored[node] = costs.nbytes(node) * stored[base] // max(1, costs.nbytes(base))
            else:
                lifetimes.own(node, costs.nbytes(node), position)
                lifetimes.workspaces[position] = max(0, cost.peak_live_bytes - costs.nbytes(node))
    return MethodCost(flops, read, written, 0, lifetimes.peak(len(module.graph.nodes)))


def _call_cost(
    node: Node, module: GraphModule, costs: OperatorCosts, stored: dict[Node, int]
) -> tuple[MethodCost, Node | None]:
    """Return the cost of one call, and the input in whose memory the result lies, if it does.

    `stored` says how many bytes each weight has as it is stored; dequantized weights are added to it.
    """
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _higher_order_cost(node, module, costs), None
    if not isinstance(node.target, torch._ops.OpOverload):
        return MethodCost(), node.all_input_nodes[0] if node.target is operator.getitem else None
    if costs.dequantizes(node) and all(used in stored for used in node.all_input_nodes):
        stored[node] = sum(stored[used] for used in node.all_input_nodes)
        return MethodCost(), node.all_input_nodes[0]
    flops, view = costs.flops_and_view(node)
    if view is not None:
        return MethodCost(flops), view
    read, written = costs.traffic(node, stored)
    return MethodCost(flops, read, written), costs.returned_destination(node)


def _higher_order_cost(node: Node, module: GraphModule, costs: OperatorCosts) -> MethodCost:
    """Return the cost of the dearest graph in each respect; without one, of moving operands and results."""
    graphs = [module.get_submodule(str(used.target)) for used in node.all_input_nodes if used.op == "get_attr"]
    branches = [
        _graph_cost(graph, costs, (), {one.name for one in graph.graph.find_nodes(op="placeholder")})
        for graph in graphs
        if isinstance(graph, GraphModule)
    ]
    if not branches:
        return MethodCost(0, sum(map(costs.nbytes, node.all_input_nodes)), costs.nbytes(node))
    return MethodCost(*map(max, zip(*map(astuple, branches), strict=True)))


@dataclass
class _Lifetimes:
    """Which memory each node's value lies in, and from where to where in the graph that memory is needed."""

    owners: dict[Node, Node | None] = field(default_factory=dict)
    spans: dict[Node, tuple[int, int, int]] = field(default_factory=dict)
    workspaces: dict[int, int] = field(default_factory=dict)

    def own(self, node: Node, nbytes: int, position: int) -> None:
        """Let `node` hold memory of its own from `position` on."""
        self.owners[node] = node
        self.spans[node] = (position, position, nbytes)

    def use(self, node: Node, position: int) -> None:
        """Keep the memory that `node` lies in until `position`."""
        owner = self.owners.get(node)
        if owner is not None:
            start, _, nbytes = self.spans[owner]
            self.spans[owner] = (start, position, nbytes)

    def peak(self, length: int) -> int:
        """Return the largest sum of memory needed at one of `length` positions."""
        changes = [0] * (length + 1)
        for start, last, nbytes in self.spans.values():
            changes[start] += nbytes
            changes[last + 1] -= nbytes
        alive = peak = 0
        for position in range(length):
            alive += changes[position]
            peak = max(peak, alive + self.workspaces.get(position, 0))
        return peak
