"""Helpers to edit the graph of an `ExportedProgram` and to put the program together again.

A `GraphEditor` is what graph passes work with: it owns a private copy of the graph, adds nodes with fake
values at once, and knows which tensors the placeholders stand for. The pass manager builds the new program
from it, with a signature that fits; authors touch no signature.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

from triptych.compiler.derived_weights import DerivedWeights
from triptych.compiler.fingerprint import graph_key
from triptych.compiler.provenance import CAPTURE, MADE_BY
from triptych.errors import VerificationError

STATE_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def storage_identity(tensor: Tensor) -> int:
    """Return a number that two tensors share exactly where they share their storage."""
    return int(tensor.untyped_storage()._cdata)


def bound_tensor(exported: ExportedProgram, name: str) -> Tensor:
    """Return the parameter, buffer or constant called `name`; raises `VerificationError` where it is no tensor."""
    value = exported.state_dict.get(name, exported.constants.get(name))
    if not isinstance(value, Tensor):
        raise VerificationError(f"{name!r} is bound to {type(value).__name__}, expected a tensor")
    return value


def bound_names(exported: ExportedProgram) -> dict[str, str]:
    """Return placeholder name → fully qualified name, for parameters, buffers and constants."""
    return {
        spec.arg.name: spec.target
        for spec in exported.graph_signature.input_specs
        if spec.kind in STATE_KINDS and spec.target is not None
    }


def tensor_names(exported: ExportedProgram) -> list[str]:
    """Return every name under which the method holds a tensor, aliases included, sorted."""
    bound = set(bound_names(exported).values())
    return sorted(bound | {name for name, value in exported.state_dict.items() if isinstance(value, Tensor)})


def mutated_buffers(exported: ExportedProgram) -> frozenset[str]:
    """Return the names of the tensors that a call changes, by in-place operators or by functional copies."""
    bound = bound_names(exported)
    origin: dict[Node, str] = {}
    changed = set(exported.graph_signature.buffers_to_mutate.values())
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in bound:
            origin[node] = bound[node.name]
        elif node.target is operator.getitem and node.args[0] in origin:
            origin[node] = origin[node.args[0]]
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            for position, argument in enumerate(schema.arguments):
                value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
                if argument.alias_info is None or not isinstance(value, Node) or value not in origin:
                    continue
                if argument.alias_info.is_write:
                    changed.add(origin[value])
                if any(result.alias_info is not None for result in schema.returns):
                    origin[node] = origin[value]
    return frozenset(changed)


def rebuild(
    exported: ExportedProgram,
    graph_module: GraphModule,
    signature: ExportGraphSignature | None = None,
    state_dict: dict[str, Any] | None = None,
    constants: dict[str, Any] | None = None,
) -> ExportedProgram:
    """Return a program with `graph_module`'s graph; tensors and everything not given are shared with `exported`."""
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature or exported.graph_signature,
        state_dict=exported.state_dict if state_dict is None else state_dict,
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants=exported.constants if constants is None else constants,
        verifiers=list(exported.verifiers),
    )


def tidied(exported: ExportedProgram) -> ExportedProgram:
    """Return `exported` as methods of a program want it.

    1. Parameters, buffers and constants that no node uses are dropped: export lists every tensor of the module.
       Other names of a tensor that is used (tied weights) are kept.
    2. Assertions about dtypes that tracing has settled are dropped, and so is what no result or state depends on.
    3. Tensors are detached, sharing their storage: no target lowers a mutation beside a gradient.
    """
    graph_module = copy_graph_module(exported)
    for node in list(graph_module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    state = {name: _detached(value) for name, value in exported.state_dict.items()}
    return _with_used_tensors(exported, graph_module, exported.graph_signature, state)


def _with_used_tensors(
    exported: ExportedProgram, graph_module: GraphModule, signature: ExportGraphSignature, state: dict[str, Any]
) -> ExportedProgram:
    """Rebuild with the tensors that nodes use, and with the other names of these tensors."""
    bound = {spec.arg.name for spec in signature.input_specs if spec.kind in STATE_KINDS}
    for node in list(graph_module.graph.nodes):
        if node.op == "placeholder" and node.name in bound and not node.users:
            graph_module.graph.erase_node(node)
    names = {node.name for node in graph_module.graph.nodes}
    kept = [spec for spec in signature.input_specs if spec.arg.name in names]
    used = {storage_identity(state[spec.target]) for spec in kept if spec.target in state}
    targets = {spec.target for spec in kept}
    targets |= {name for name, value in state.items() if storage_identity(value) in used}
    graph_module.recompile()
    return rebuild(
        exported,
        graph_module,
        ExportGraphSignature(kept, list(signature.output_specs)),
        {name: value for name, value in state.items() if name in targets},
        {name: value for name, value in exported.constants.items() if name in targets},
    )


def _detached(tensor: Tensor) -> Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach()


def copy_graph_module(exported: ExportedProgram) -> GraphModule:
    """Return a module with a copy of the graph; nested graphs and tensors are shared."""
    original = exported.graph_module
    graph = Graph()
    mapping: dict[Node, Node] = {}
    output = graph.graph_copy(original.graph, mapping, return_output_node=True)
    assert isinstance(output, tuple)
    value, old_output = output
    graph.output(value).meta = dict(old_output.meta)
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    graph._codegen = original.graph._codegen
    copied = GraphModule(original, graph)
    copied.meta = dict(original.meta)
    return copied


@dataclass(frozen=True)
class Traced:
    """A function as a graph: a placeholder for each of `inputs`, the nodes over whose values it was traced."""

    graph: Graph
    inputs: tuple[Node, ...]

    @property
    def results(self) -> Any:
        """What the function returned, with nodes of `graph` for tensors."""
        return self.graph.output_node().args[0]


class GraphEditor:
    """A method's graph under change. `made_by` names the pass at work; the nodes it adds will carry that name.

    The manager hands one `derived` to the editors of all methods in a run, so that they share the weights they derive.
    """

    def __init__(
        self, exported: ExportedProgram, made_by: str = CAPTURE, derived: DerivedWeights | None = None
    ) -> None:
        self._exported = exported
        self._made_by = made_by
        self._derived = DerivedWeights(mutated_buffers(exported)) if derived is None else derived
        self._derived_nodes: dict[int, Node] = {}
        self._bound = bound_names(exported)
        self._inputs = list(exported.graph_signature.input_specs)
        self._state = dict(exported.state_dict)
        self.graph_module = copy_graph_module(exported)
        self._given = set(self.graph_module.graph.nodes)
        self.graph = self.graph_module.graph
        self.fake_mode = _fake_mode(self.graph)
        if self.fake_mode.shape_env is not None:
            # Another lowering of the same program may have left symbols behind in the environment they share.
            self.fake_mode.shape_env.pending_fresh_unbacked_symbols.clear()

    @property
    def changed(self) -> bool:
        """True where the graph differs from the one the editor was given."""
        return graph_key(self.graph) != graph_key(self._exported.graph)

    def calls(self, *targets: Callable[..., Any]) -> Iterator[Node]:
        """Yield the nodes that call one of `targets`, in order; safe while editing."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.target in targets:
                yield node

    def input(self, name: str) -> Node:
        """Return the placeholder of the user input `name`; raises `VerificationError` where there is none."""
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                found: Node = node
                return found
        raise VerificationError(f"the method has no input {name!r}")

    def tensor_name(self, node: Node) -> str | None:
        """Return the fully qualified name of the parameter or buffer that `node` stands for, or None."""
        return self._bound.get(node.name) if node.op == "placeholder" else None

    def tensor(self, node: Node) -> Tensor:
        """Return the value of the parameter, buffer or constant that `node` stands for; never change it in place.

        Raises `VerificationError` for any other node.
        """
        name = self.tensor_name(node)
        value = None if name is None else self._state.get(name, self._exported.constants.get(name))
        if not isinstance(value, Tensor):
            raise VerificationError(f"{node.name} stands for no parameter, buffer or constant")
        return value

    def is_weight(self, node: Node) -> bool:
        """True where `node` stands for a parameter, buffer or constant tensor that no call changes."""
        name = self.tensor_name(node)
        if name is None or name in self._derived.state:
            return False
        return isinstance(self._state.get(name, self._exported.constants.get(name)), Tensor)

    def add_weight(self, name: str, value: Tensor) -> Node:
        """Add a parameter called `name` and return the node that stands for it.

        A name that is taken gets a number; weights of equal storage stay one weight. The tensor that nodes no
        longer use leaves the method by itself.
        """
        taken = {spec.target for spec in self._inputs} | set(self._state)
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        unique = next(one for one in itertools.chain([name], numbered) if one not in taken)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(f"p_{unique.replace('.', '_')}")
        node.meta["val"] = self.fake_mode.from_tensor(value, static_shapes=True)
        self._bound[node.name] = unique
        self._state[unique] = torch.nn.Parameter(value.detach(), requires_grad=False)
        self._inputs.insert(0, InputSpec(InputKind.PARAMETER, TensorArgument(name=node.name), unique))
        return node

    def derive_weight(
        self, name: str, sources: Sequence[Node], make: Callable[..., Tensor], key: Hashable = ()
    ) -> Node:
        """Add the weight ``make(*tensors)`` over the tensors that `sources` stand for, and return its node.

        It is computed once in a run of a pass over all methods: the same elements of the same storages, the same
        function and an equal `key` give one tensor, so methods that share the sources share it too, and a second
        call in one method gives the node of the first. `key` must hold whatever else the result depends on, such as
        values that `make` has from around it. `make` must be deterministic; it may return a view.

        Raises `VerificationError` for a source that is no parameter, buffer or constant, and for state, whose value
        at compile time says nothing of a call.
        """
        for source in sources:
            if self.tensor_name(source) is not None and not self.is_weight(source):
                raise VerificationError(
                    f"{source.name} stands for the state {self.tensor_name(source)}, which calls change; a weight can "
                    "be derived from tensors that stay as they are"
                )
        value = self._derived.get([self.tensor(source) for source in sources], make, key)
        identity = storage_identity(value)
        if identity not in self._derived_nodes:
            self._derived_nodes[identity] = self.add_weight(name, value)
        return self._derived_nodes[identity]

    @property
    def last_placeholder(self) -> Node:
        """The node after which computed nodes may stand."""
        last: Node = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
        return last

    @property
    def user_outputs(self) -> list[Node]:
        """The nodes whose values the caller receives, in order."""
        values = self.graph.output_node().args[0]
        specs = self._exported.graph_signature.output_specs
        assert isinstance(values, (tuple, list))
        return [
            value
            for spec, value in zip(specs, values, strict=True)
            if spec.kind == OutputKind.USER_OUTPUT and isinstance(value, Node)
        ]

    def replace_user_output(self, index: int, node: Node) -> None:
        """Return `node` to the caller in place of user output `index`."""
        output = self.graph.output_node()
        values = output.args[0]
        assert isinstance(values, (tuple, list))
        positions = [
            position
            for position, spec in enumerate(self._exported.graph_signature.output_specs)
            if spec.kind == OutputKind.USER_OUTPUT
        ]
        changed = list(values)
        changed[positions[index]] = node
        output.args = (tuple(changed),)

    def call(self, target: Callable[..., Any], *args: Any, like: Node | None = None, **kwargs: Any) -> Node:
        """Add a call at the insertion point, with its fake value; `like` lends its source location."""
        node = self.graph.call_function(target, args, kwargs)
        if like is not None:
            node.meta = {key: value for key, value in like.meta.items() if key not in ("val", "unbacked_bindings")}
        self.refresh(node)
        return node

    def refresh(self, node: Node) -> None:
        """Compute `node`'s fake value again from its inputs' values."""
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda used: used.meta["val"])
        assert callable(node.target)
        with self.fake_mode:
            value = node.target(*args, **kwargs)
        node.meta["val"] = value
        bindings = compute_unbacked_bindings(self.fake_mode.shape_env, value)
        if bindings:
            node.meta["unbacked_bindings"] = bindings

    def refresh_after(self, *changed: Node) -> None:
        """Compute again the values of everything that depends on `changed`, in order.

        A ``view`` that new strides no longer allow becomes a ``reshape``.
        """
        dirty = set(changed)
        for node in self.graph.nodes:
            if node.op == "call_function" and any(used in dirty for used in node.all_input_nodes):
                before = node.meta.get("val")
                try:
                    self.refresh(node)
                except (RuntimeError, ValueError):
                    if node.target is not torch.ops.aten.view.default:
                        raise
                    node.target = torch.ops.aten.reshape.default
                    self.refresh(node)
                if not _same_value(before, node.meta["val"]):
                    dirty.add(node)

    def trace(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, decompose: bool = False
    ) -> Traced:
        """Trace `function` over the values of the nodes in `args` and `kwargs`, which may lie in lists; adds nothing.

        With `decompose` composite operators inside, and `function` itself where it is one, are taken apart.
        """
        inputs: dict[Node, None] = {}
        torch.fx.map_arg((tuple(args), dict(kwargs)), inputs.setdefault)

        def body(*values: Any) -> Any:
            given = dict(zip(inputs, values, strict=True))
            arguments, named = torch.fx.map_arg((tuple(args), dict(kwargs)), lambda used: given[used])
            return function(*arguments, **named)

        with self.fake_mode:
            traced = make_fx(body, pre_dispatch=not decompose)(*(used.meta["val"] for used in inputs))
        traced.graph.eliminate_dead_code()
        return Traced(traced.graph, tuple(inputs))

    def paste(self, traced: Traced, like: Node) -> Any:
        """Add what was traced at the insertion point and return its results; `like` lends its source location."""
        placeholders = [inner for inner in traced.graph.nodes if inner.op == "placeholder"]
        mapping: dict[Node, Node] = dict(zip(placeholders, traced.inputs, strict=True))
        source: dict[str, Any] = {key: like.meta[key] for key in ("stack_trace", "nn_module_stack") if key in like.meta}
        for inner in traced.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                mapping[inner] = self.graph.node_copy(inner, lambda used: mapping[used])
                mapping[inner].meta = {"val": inner.meta.get("val"), **source}
                if "unbacked_bindings" in inner.meta:
                    mapping[inner].meta["unbacked_bindings"] = inner.meta["unbacked_bindings"]
        return torch.fx.map_arg(traced.results, lambda used: mapping[used])

    def inline(self, node: Node, function: Callable[..., Any], *, decompose: bool = False) -> None:
        """Replace `node` by the traced body of `function`, which takes `node`'s arguments and gives its results.

        With `decompose` composite operators inside, and `function` itself where it is one, are taken apart.
        """
        traced = self.trace(function, node.args, node.kwargs, decompose=decompose)
        with self.graph.inserting_before(node):
            results = self.paste(traced, like=node)
        replace_results(node, results)
        self.graph.erase_node(node)

    def finish(self) -> ExportedProgram:
        """Return the edited program: dead code and unused tensors gone, the signature brought up to date."""
        self.graph.eliminate_dead_code()
        self.graph.lint()
        for node in self.graph.nodes:
            if node not in self._given:
                node.meta[MADE_BY] = self._made_by
        values = self.graph.output_node().args[0]
        assert isinstance(values, (tuple, list))
        outputs = [
            OutputSpec(spec.kind, type(spec.arg)(name=value.name), spec.target) if isinstance(value, Node) else spec
            for spec, value in zip(self._exported.graph_signature.output_specs, values, strict=True)
        ]
        signature = ExportGraphSignature(self._inputs, outputs)
        return _with_used_tensors(self._exported, self.graph_module, signature, self._state)


def replace_results(node: Node, results: Any) -> None:
    """Let the users of `node` use `results`: one node, a tuple of nodes behind ``getitem`` users, or nothing."""
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    elif isinstance(results, (tuple, list)):
        for user in list(node.users):
            assert user.target is operator.getitem, "a result with several parts is taken apart by getitem"
            user.replace_all_uses_with(results[int(str(user.args[1]))])
            node.graph.erase_node(user)


def _fake_mode(graph: Graph) -> FakeTensorMode:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode()


def _same_value(before: object, after: object) -> bool:
    if isinstance(before, (tuple, list)) and isinstance(after, (tuple, list)):
        return len(before) == len(after) and all(map(_same_value, before, after))
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape == after.shape and before.dtype == after.dtype and before.stride() == after.stride()
    return False
