"""Lowering without the passes that have nothing to do.

ExecuTorch turns a method into its edge dialect by eight passes over the whole graph, and prepares each XNNPACK
delegate by seventeen more over the delegate's. Every one traces its graph again, also where it finds nothing to change,
which is nearly everywhere: a decoder layer has no batch norm, no convolution and no copies. Here a pass runs only on a
graph that has something it acts on, and a pass that is not listed always runs. The file comes out byte for byte equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

Relevant = Callable[[Sequence[Node]], bool]
"""calls of a graph → may the pass find something to do there?"""

PROMOTED: Final = ("add.Tensor", "mul.Tensor", "sub.Tensor", "div.Tensor", "minimum.default")


def _calls_any(*operators: str) -> Relevant:
    """Some call's operator has one of these texts in its name."""
    return lambda calls: any(operator in _name(call) for call in calls for operator in operators)


def _name(call: Node) -> str:
    return str(getattr(call.target, "__name__", call.target))


def _custom_metadata(calls: Sequence[Node]) -> bool:
    return any("custom" in node.meta for call in calls for node in (call, *call.all_input_nodes))


def _views(calls: Sequence[Node]) -> bool:
    return any(isinstance(call.target, torch._ops.OpOverload) and call.target.is_view for call in calls)


def _symbols_for_tensors(calls: Sequence[Node]) -> bool:
    """Some call is given a symbolic number where its schema has a tensor."""
    return any(isinstance(_value(given), (torch.SymInt, torch.SymFloat, torch.SymBool)) for given in _tensors_of(calls))


def _numbers_for_tensors(calls: Sequence[Node]) -> bool:
    """Some call is given a Python number where its schema has a tensor."""
    return any(isinstance(given, (bool, int, float)) for given in _tensors_of(calls))


def _tensors_of(calls: Sequence[Node]) -> Iterator[Any]:
    """Yield what calls are given for arguments that their schemas call tensors."""
    for call in calls:
        schema = getattr(call.target, "_schema", None)
        if schema is None:
            continue
        for position, argument in enumerate(schema.arguments):
            if isinstance(argument.type, torch.TensorType):
                yield call.args[position] if position < len(call.args) else call.kwargs.get(argument.name)


def _mixed_types(calls: Sequence[Node]) -> bool:
    """Some arithmetic of two operands is not between tensors of one dtype, or divides integers."""
    for call in calls:
        if any(name in _name(call) for name in PROMOTED):
            values = [_value(given) for given in call.args]
            kinds = {value.dtype if isinstance(value, Tensor) else None for value in values}
            if len(kinds) > 1 or None in kinds or ("div" in _name(call) and not values[0].is_floating_point()):
                return True
    return False


def _value(given: Any) -> Any:
    return given.meta.get("val") if isinstance(given, Node) else given


def _unusual_strides(calls: Sequence[Node]) -> bool:
    """Some value does not lie in memory in the order of its axes."""
    values = [_value(given) for call in calls for given in (call, *call.all_input_nodes)]
    return any(
        list(value.dim_order()) != list(range(value.dim()))
        for value in values
        if isinstance(value, Tensor) and value.layout == torch.strided
    )


RELEVANT: Final[Mapping[str, Relevant]] = {
    # exir/passes, aten to edge and edge to ExecuTorch
    "NormalizeTransposePass": lambda calls: any(call.target is torch.ops.aten.t.default for call in calls),
    "ReplaceBrokenOpsWithFunctionalOpsPass": _views,
    "ScalarToTensorPass": _numbers_for_tensors,
    "SymToTensorPass": _symbols_for_tensors,
    "RemoveMixedTypeOperators": _mixed_types,
    "LegalizePortableDimOrderPass": _unusual_strides,
    # backends/xnnpack/_passes
    "XNNPACKRemoveCloneOpsTransform": _calls_any("clone"),
    "DimOrderOpsRevertPass": _calls_any("dim_order"),
    "ConvertToUpsampleBilinear2d": _calls_any("index", "upsample"),
    "ConvertToLinearPass": _calls_any("mm.default"),
    "PropagateCustomMetaPass": _custom_metadata,
    "ConvertToSDPAPass": _calls_any("softmax"),
    # It computes calls that have no tensor among their inputs.
    "ConstPropPass": lambda calls: not all(call.all_input_nodes for call in calls),
    "FuseBatchNormPass": _calls_any("batch_norm"),
    "DecomposeBatchNorm": _calls_any("batch_norm"),
    "FuseActivationPass": _calls_any("relu", "hardtanh"),
    "DecomposeConcatenate": lambda calls: any(
        "cat.default" in _name(call) and len(call.args[0]) > 5  # type: ignore[arg-type]
        for call in calls
    ),
    "RemoveGetItemPass": _calls_any("max_pool2d", "max.dim"),
    "InsertPadQDQPass": _calls_any("constant_pad_nd"),
    "Conv1dUnsqueezePass": _calls_any("convolution"),
    "PReLUReshapePass": _calls_any("prelu"),
    "ChannelsLastTaggedReshapePass": _calls_any(
        "convolution", "upsample", "mean", "pool2d", "amax", "max.dim", "prelu", "_to_copy", "batch_norm"
    ),
    "RemoveRedundantCopyPass": _calls_any("_to_copy"),
}
"""Name of a pass of ExecuTorch 1.4 → when it is needed."""


def _is_needed(name: str, graph_module: GraphModule) -> bool:
    relevant = RELEVANT.get(name)
    if relevant is None:
        return True
    graphs = (one.graph for one in graph_module.modules() if isinstance(one, GraphModule))
    return any(relevant([node for node in graph.nodes if node.op == "call_function"]) for graph in graphs)


@contextmanager
def needed_passes_only() -> Iterator[None]:
    """Let ExecuTorch run the passes that have something to do, for the time of a lowering."""
    from executorch.backends.xnnpack._passes import XNNPACKPassManager
    from executorch.exir.pass_base import ExportPass
    from torch.fx.passes.infra.pass_base import PassResult

    prepare, run = XNNPACKPassManager.transform, ExportPass.__call__

    def prepare_needed(manager: Any) -> Any:
        exported = manager.exported_program
        for one in manager.passes:
            if _is_needed(one.__name__, exported.graph_module):
                exported = prepare(XNNPACKPassManager(exported, [one]))
        return exported

    def run_needed(one: Any, graph_module: GraphModule) -> Any:
        return (
            run(one, graph_module) if _is_needed(type(one).__name__, graph_module) else PassResult(graph_module, False)
        )

    XNNPACKPassManager.transform, ExportPass.__call__ = prepare_needed, run_needed
    try:
        yield
    finally:
        XNNPACKPassManager.transform, ExportPass.__call__ = prepare, run
