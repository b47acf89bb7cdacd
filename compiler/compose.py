"""Composition of two methods into one: the consumer takes what the producer gives without a call in between.

The values of the producer's graph move into the symbolic shapes of the consumer's, dimension by dimension as the
joined ports say, so that nothing is traced again and every node keeps where it comes from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from triptych.compiler.capture import output_signatures, user_input_values
from triptych.compiler.editing import (
    STATE_KINDS,
    bound_tensor,
    mutated_buffers,
    storage_identity,
    tidied,
)
from triptych.compiler.program import Method
from triptych.compiler.symbols import UNCHANGED, Dimensions
from triptych.errors import VerificationError
from triptych.manifest import Dim, DynamicDim, TensorSignature

KIND_ORDER: Final = {kind: index for index, kind in enumerate(STATE_KINDS)}


def compose(producer: Method, consumer: Method, ports: Mapping[str, str]) -> Method:
    """Return one method that runs `producer` and then `consumer`, with the consumer's roles and outputs.

    `ports` maps outputs of the producer to the inputs of the consumer that take them. The method takes the
    producer's inputs, then the inputs of the consumer that nothing feeds; an input of one name in both is one input.
    Outputs of the producer that `ports` leaves out are dropped.

    1. Tensors of one fully qualified name and one storage are one. A weight that only has its name in common with
       another gets a number; a state row must be one row.
    2. A dynamic dimension of the producer becomes the consumer's dimension where the ports meet, with the range
       that both allow; where the consumer's is fixed, so is the producer's from then on.
    3. Everything the producer does happens before anything the consumer does, so state is written and read in the
       order of two calls.

    Raises `VerificationError` where ports or state do not fit.
    """
    _check_kinds(producer.exported, consumer.exported)
    joined = _joined_ports(producer, consumer, ports)
    dimensions = _dimensions(producer, consumer, joined)
    inputs = _inputs(producer, consumer, ports, dimensions)
    builder = _Builder(producer.exported, consumer.exported, dimensions)
    builder.add_tensors()
    builder.add_inputs(inputs)
    given = builder.copy_producer()
    for produced, consumed in joined:
        builder.feed(consumed.name, given[[port.name for port in producer.outputs].index(produced.name)])
    exported = builder.finish(inputs)
    return Method(exported, consumer.roles, inputs, output_signatures(exported, consumer.outputs, inputs))


# ---------------------------------------------------------------------------------------------------- ports


def _joined_ports(
    producer: Method, consumer: Method, ports: Mapping[str, str]
) -> list[tuple[TensorSignature, TensorSignature]]:
    """Return the pairs of ports that meet; raises `VerificationError` where two cannot."""
    outputs = {port.name: port for port in producer.outputs}
    inputs = {port.name: port for port in consumer.inputs}
    if not ports:
        raise VerificationError("nothing is to be joined; name an output of the producer and an input of the consumer")
    if len(set(ports.values())) < len(ports):
        raise VerificationError(f"one input takes one output; the ports are {dict(ports)}")
    joined = []
    for output, taken in ports.items():
        if output not in outputs:
            raise VerificationError(f"the producer has no output {output!r}; it has {', '.join(outputs)}")
        if taken not in inputs:
            raise VerificationError(f"the consumer has no input {taken!r}; it has {', '.join(inputs)}")
        produced, consumed = outputs[output], inputs[taken]
        if produced.dtype != consumed.dtype or len(produced.shape) != len(consumed.shape):
            raise VerificationError(
                f"{output} → {taken}: {produced.dtype} {list(produced.shape)} is produced, {consumed.dtype} "
                f"{list(consumed.shape)} is taken; both must have one dtype and rank"
            )
        joined.append((produced, consumed))
    return joined


def _dimensions(
    producer: Method, consumer: Method, joined: Iterable[tuple[TensorSignature, TensorSignature]]
) -> Dimensions:
    """Return what becomes of the producer's dimensions, from the ports that meet and the inputs of one name."""
    dimensions = Dimensions(producer.exported, consumer.exported)
    outputs = dict(zip([port.name for port in producer.outputs], _user_outputs(producer.exported), strict=True))
    own, taken = user_input_values(producer.exported), user_input_values(consumer.exported)
    for produced, consumed in joined:
        value = outputs[produced.name].meta["val"]
        dimensions.unify(f"{produced.name} → {consumed.name}", value, taken[consumed.name])
    for name in own.keys() & taken.keys() - {consumed.name for _, consumed in joined}:
        if own[name].dtype != taken[name].dtype or own[name].dim() != taken[name].dim():
            raise VerificationError(
                f"both methods take {name!r}, the producer as {own[name].dtype} with {own[name].dim()} dimensions, the "
                f"consumer as {taken[name].dtype} with {taken[name].dim()}; rename one"
            )
        dimensions.unify(f"the input {name} of both", own[name], taken[name])
    dimensions.settle()
    return dimensions


def _inputs(
    producer: Method, consumer: Method, ports: Mapping[str, str], dimensions: Dimensions
) -> tuple[TensorSignature, ...]:
    """Return the inputs of the composed method, with dimensions of one symbol under one name and range."""
    own, taken = user_input_values(producer.exported), user_input_values(consumer.exported)
    first = [(port, tuple(dimensions.moved(own[port.name], dimensions.producers).shape)) for port in producer.inputs]
    names = {port.name for port in producer.inputs}
    rest = [
        (port, tuple(taken[port.name].shape))
        for port in consumer.inputs
        if port.name not in names and port.name not in ports.values()
    ]
    # The consumer's names win: its other ports speak of them.
    named: dict[str, str] = {}
    for port in consumer.inputs:
        for size, dim in zip(taken[port.name].shape, port.shape, strict=True):
            if isinstance(dim, DynamicDim):
                named.setdefault(str(size), dim.name)
    free = set(named.values())

    def dim_of(size: int | torch.SymInt, old: Dim) -> Dim:
        if isinstance(size, int):
            return size
        symbol = str(size)
        if symbol not in named:
            assert isinstance(old, DynamicDim)
            named[symbol] = old.name if old.name not in free else f"{old.name}_{symbol}"
            free.add(named[symbol])
        minimum, maximum = dimensions.bounds(size)
        return DynamicDim(named[symbol], minimum, maximum)

    return tuple(
        dataclasses.replace(port, shape=tuple(dim_of(size, old) for size, old in zip(shape, port.shape, strict=True)))
        for port, shape in (*first, *rest)
    )


def _user_outputs(exported: ExportedProgram) -> list[Node]:
    values = exported.graph.output_node().args[0]
    assert isinstance(values, (tuple, list))
    return [value for value in values if isinstance(value, Node)]


def _check_kinds(*methods: ExportedProgram) -> None:
    """Methods as capture makes them change state in place and take nothing but tensors."""
    for exported in methods:
        signature = exported.graph_signature
        known = {*STATE_KINDS, InputKind.USER_INPUT}
        odd = [spec for spec in signature.input_specs if spec.kind not in known]
        odd_outputs = [spec for spec in signature.output_specs if spec.kind != OutputKind.USER_OUTPUT]
        if odd or odd_outputs:
            kinds = ", ".join(sorted({str(spec.kind) for spec in (*odd, *odd_outputs)}))
            raise VerificationError(
                f"a method with {kinds} cannot be composed; compose methods as they were captured, before any lowering"
            )


# ---------------------------------------------------------------------------------------------------- graph


class _Builder:
    """The composed graph as it grows: tensors, inputs, the producer's nodes, the consumer's nodes."""

    def __init__(self, producer: ExportedProgram, consumer: ExportedProgram, dimensions: Dimensions) -> None:
        self._producer = producer
        self._consumer = consumer
        self._dimensions = dimensions
        self._graph = Graph()
        self._graph._codegen = consumer.graph._codegen
        self._root = torch.nn.Module()
        self._specs: list[InputSpec] = []
        self._state = dict(consumer.state_dict)
        self._constants = dict(consumer.constants)
        self._from_producer: dict[Node, Node] = {}
        self._from_consumer: dict[Node, Node] = {}

    def add_tensors(self) -> None:
        """Add a placeholder for every parameter, buffer and constant of either method, one for what both have."""
        producers = {str(spec.target): spec for spec in _lifted(self._producer)}
        consumers = {str(spec.target): spec for spec in _lifted(self._consumer)}
        added: list[tuple[InputSpec, str]] = []
        for name, spec in producers.items():
            own_name = self._name_here(name)
            if own_name not in consumers:
                added.append((spec, own_name))
        # The graph lists parameters before buffers before constants, as export does.
        of_consumer = [(spec, name, False) for name, spec in consumers.items()]
        of_producer = [(spec, name, True) for spec, name in added]
        for spec, name, is_producers in sorted((*of_consumer, *of_producer), key=lambda one: KIND_ORDER[one[0].kind]):
            old = _placeholder(self._producer if is_producers else self._consumer, spec.arg.name)
            new = self._graph.placeholder(old.name)
            new.target = new.name  # which got a number where the other method has a tensor of that name
            new.meta = self._moved_meta(old, is_producers=is_producers)
            self._specs.append(InputSpec(spec.kind, TensorArgument(name=new.name), name, spec.persistent))
            if is_producers:
                bucket = self._state if spec.target in self._producer.state_dict else self._constants
                bucket[name] = bound_tensor(self._producer, str(spec.target))
                self._from_producer[old] = new
            else:
                self._from_consumer[old] = new
        for name in producers.keys() & consumers.keys():
            old = _placeholder(self._producer, producers[name].arg.name)
            if old not in self._from_producer:
                target = _placeholder(self._consumer, consumers[name].arg.name)
                self._from_producer[old] = self._from_consumer[target]
        for name, value in self._producer.state_dict.items():  # other names of tied weights stay known
            self._state.setdefault(name, value)

    def _name_here(self, name: str) -> str:
        """Return the name of a tensor of the producer in the composed method; see `compose`, 1."""
        if name not in self._state and name not in self._constants:
            return name
        if _same_tensor(bound_tensor(self._producer, name), bound_tensor(self._consumer, name)):
            return name
        if name in mutated_buffers(self._producer) | mutated_buffers(self._consumer):
            raise VerificationError(f"state {name!r} is not one row in the two methods; compose methods of one program")
        known = {*self._state, *self._constants, *self._producer.state_dict, *self._producer.constants}
        return next(one for number in range(1, len(known) + 2) if (one := f"{name}_{number}") not in known)

    def add_inputs(self, inputs: Iterable[TensorSignature]) -> None:
        """Add a placeholder for each input, under exactly its name."""
        own = {node.name: node for node in self._producer.graph.nodes if node.op == "placeholder"}
        others = {node.name: node for node in self._consumer.graph.nodes if node.op == "placeholder"}
        for port in inputs:
            new = self._graph.placeholder(port.name)
            if new.name != port.name:
                raise VerificationError(f"the input {port.name!r} has the name of a tensor of the other method")
            if port.name in own:
                new.meta = self._moved_meta(own[port.name], is_producers=True)
                self._from_producer[own[port.name]] = new
            else:
                new.meta = self._moved_meta(others[port.name], is_producers=False)
            if port.name in others:
                self._from_consumer[others[port.name]] = new
            self._specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(name=new.name), None))

    def copy_producer(self) -> list[Node]:
        """Add the producer's nodes and return those that stand for its outputs."""
        for node in self._producer.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._from_producer[node] = self._copy(node, self._from_producer, is_producers=True)
        return [self._from_producer[node] for node in _user_outputs(self._producer)]

    def feed(self, name: str, value: Node) -> None:
        """Let `value` stand for the consumer's input `name`; a layout that the input did not have is put right."""
        old = _placeholder(self._consumer, name)
        wanted = self._moved_meta(old, is_producers=False)["val"]
        if str(value.meta["val"].stride()) != str(wanted.stride()):
            source = value
            value = self._graph.call_function(
                torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
            )
            value.meta = {**source.meta, "val": wanted}
        self._from_consumer[old] = value

    def finish(self, inputs: tuple[TensorSignature, ...]) -> ExportedProgram:
        """Add the consumer's nodes and return the program."""
        for node in self._consumer.graph.nodes:
            if node.op not in ("placeholder", "output"):
                self._from_consumer[node] = self._copy(node, self._from_consumer, is_producers=False)
        old_output = self._consumer.graph.output_node()
        values = torch.fx.map_arg(old_output.args[0], lambda used: self._from_consumer[used])
        self._graph.output(values).meta = dict(old_output.meta)
        graph_module = GraphModule(self._root, self._graph)
        graph_module.meta = dict(self._consumer.graph_module.meta)
        outputs = [
            OutputSpec(spec.kind, TensorArgument(name=value.name), spec.target)
            for spec, value in zip(self._consumer.graph_signature.output_specs, values, strict=True)
        ]
        composed = ExportedProgram(
            root=graph_module,
            graph=graph_module.graph,
            graph_signature=ExportGraphSignature(self._specs, outputs),
            state_dict=self._state,
            range_constraints=self._dimensions.range_constraints,
            module_call_graph=self._module_calls(inputs),
            example_inputs=None,
            constants=self._constants,
            verifiers=list(self._consumer.verifiers),
        )
        return tidied(composed)

    def _moved_meta(self, node: Node, *, is_producers: bool) -> dict[str, Any]:
        return self._dimensions.moved_meta(node.meta, self._dimensions.producers if is_producers else UNCHANGED)

    def _copy(self, node: Node, mapping: dict[Node, Node], *, is_producers: bool) -> Node:
        if node.op == "get_attr":
            new = self._graph.create_node("get_attr", self._add_branch(node, is_producers=is_producers))
        else:
            new = self._graph.node_copy(node, lambda used: mapping[used])
        new.meta = self._moved_meta(node, is_producers=is_producers)
        return new

    def _add_branch(self, node: Node, *, is_producers: bool) -> str:
        """Graphs of branches hang on the module; one of each name gets a number."""
        source = self._producer if is_producers else self._consumer
        value = source.graph_module.get_submodule(str(node.target))
        if isinstance(value, GraphModule):
            value = self._dimensions.moved_module(value, self._dimensions.producers if is_producers else UNCHANGED)
        taken = dict(self._root.named_children())
        wanted = str(node.target).replace(".", "_")
        candidates = [wanted, *(f"{wanted}_{number}" for number in range(1, len(taken) + 2))]
        name = next(one for one in candidates if one not in taken)
        self._root.add_module(name, value)
        return name

    def _module_calls(self, inputs: tuple[TensorSignature, ...]) -> list[ModuleCallEntry]:
        names = [port.name for port in inputs]
        (first, *rest) = self._consumer.module_call_graph
        assert first.signature is not None
        signature = ModuleCallSignature(
            inputs=[],
            outputs=[],
            in_spec=pytree.tree_flatten((tuple(names), {}))[1],
            out_spec=first.signature.out_spec,
            forward_arg_names=names,
        )
        known = {entry.fqn for entry in self._consumer.module_call_graph}
        others = [entry for entry in self._producer.module_call_graph if entry.fqn not in known]
        return [ModuleCallEntry("", signature), *rest, *others]


def _lifted(exported: ExportedProgram) -> list[InputSpec]:
    return [spec for spec in exported.graph_signature.input_specs if spec.kind in STATE_KINDS]


def _placeholder(exported: ExportedProgram, name: str) -> Node:
    found: Node = next(node for node in exported.graph.nodes if node.op == "placeholder" and node.name == name)
    return found


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    def view(tensor: Tensor) -> object:
        return storage_identity(tensor), tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    return view(one) == view(other)
