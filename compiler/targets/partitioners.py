"""What Triptych adds around ExecuTorch's partitioners: reasons for what they leave outside, and state that is shared.

Imported while lowering only: it needs executorch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from executorch.backends.xnnpack.operators import node_visitor
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.generic_node_configs import SliceCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir.backend.canonical_partitioners.config_partitioner import format_target_name
from executorch.exir.backend.partitioner import DelegationSpec, Partitioner, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from triptych.compiler.editing import bound_names, mutated_buffers
from triptych.compiler.partition_explainer import calls, general_reason, reason_key
from triptych.compiler.targets.levels import levels

NO_RULE = "XNNPACK has no rule for this operator"
IN_SHARED_STATE = "it works on state that methods share, and a delegate would keep its own copy"
SYMBOLIC = "an argument is a symbolic size, and this delegate takes tensors only"

Support = Callable[[Node], str | None]
"""Returns None where the back end takes a call, else the reason why not."""


class DynamicSlice(SliceCopyConfig):  # type: ignore[misc]  # executorch has no types
    """XNNPACK's rule for slices, which takes tensors with dimensions of dynamic size too, cut along another axis."""

    def check_constraints(self, node: Node, ep: ExportedProgram) -> bool:
        """Say whether the slice is in steps of one along an axis of fixed size."""
        arguments: tuple[Any, ...] = (*node.args, *(0, 0, None, None, 1)[len(node.args) :])
        x, axis, _, _, step = arguments
        before, after = x.meta["val"].shape, node.meta["val"].shape
        cut = isinstance(before[axis], int) and isinstance(after[axis], int) and 0 not in (before[axis], after[axis])
        if not cut or step != 1:
            return bool(super().check_constraints(node, ep))
        return bool(self.check_common_constraints(node, ep))


@contextmanager
def dynamic_slices() -> Iterator[None]:
    """Write the sizes of slices that are dynamic as 0, for the time of a lowering: XNNPACK takes it for "all of it"."""
    slices = node_visitor._node_visitor_dict["aten.slice_copy.Tensor"]  # noqa: SLF001 (the class has no other name)
    define = slices.define_node

    def define_dynamic(visitor: Any, node: Node, graph: Any, *rest: Any) -> None:
        define(visitor, node, graph, *rest)
        written = graph.xnodes[-1].xnode_union
        written.sizes = [
            given if isinstance(size, int) else 0
            for given, size in zip(written.sizes, node.meta["val"].shape, strict=True)
        ]

    slices.define_node = define_dynamic
    try:
        yield
    finally:
        slices.define_node = define


class WatchedXnnpack(Partitioner):  # type: ignore[misc]
    """XNNPACK's partitioner, whose rules are asked again about every call that it left outside."""

    def __init__(self) -> None:
        """Make the partitioner that serves float and quantized layers."""
        super().__init__()
        rules = [DynamicSlice if one is SliceCopyConfig else one for one in ALL_PARTITIONER_CONFIGS]
        self._inner = XnnpackPartitioner(configs=rules)
        self.reasons: dict[tuple[str, str], str] = {}

    def ops_to_not_decompose(self, ep: ExportedProgram) -> Any:
        """Return the operators that XNNPACK takes whole."""
        return self._inner.ops_to_not_decompose(ep)

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag what XNNPACK's rules match, by depth, and note the reasons for the rest."""
        groups = self._inner.get_matched_nodes_from_configs(exported_program)
        tags = {}
        for depth, nodes in levels(exported_program.graph, groups).items():
            tags[f"tag{depth}"] = self._inner.delegation_spec
            for node in nodes:
                node.meta["delegation_tag"] = f"tag{depth}"
        for node in calls(exported_program.graph_module):
            if "delegation_tag" not in node.meta:
                self.reasons[reason_key(node)] = self._reason(node, exported_program)
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=tags)

    def _reason(self, node: Node, exported: ExportedProgram) -> str:
        name = format_target_name(getattr(node.target, "__name__", str(node.target)))
        rule = self._inner.target_partitioner_configs.get(name)
        if rule is None:
            return NO_RULE
        if rule.check_constraints(node, exported):
            return "XNNPACK would take it alone, and not with what it needs"
        # Each file of rules has one `why`, which keeps the last node and its reason.
        for base in type(rule).__mro__:
            why = getattr(sys.modules[base.__module__], "why", None)
            if why is not None and getattr(why, "node", None) is node:
                return f"XNNPACK: {_in_words(node, str(why.reason))}"
        return f"XNNPACK's rule {type(rule).__name__} does not take it in this form"


def _in_words(node: Node, reason: str) -> str:
    """Return XNNPACK's reason on one line; it says "invalid dtype" of sizes among the arguments too."""
    if reason == "invalid dtype":
        if not all(_is_tensor(used.meta.get("val")) for used in node.all_input_nodes):
            return "a symbolic size is among the arguments"
        dtypes = {str(used.meta["val"].dtype) for used in node.all_input_nodes if hasattr(used.meta["val"], "dtype")}
        return f"invalid dtype, {' and '.join(sorted(dtypes)).replace('torch.', '')}"
    return " ".join(reason.split()).rstrip(".")


class TensorPartitioner(Partitioner):  # type: ignore[misc]
    """Gives a back end the largest groups of calls that it supports, from tensors to tensors.

    Back ends that keep state or sizes inside would break programs of several methods: each method's delegate would
    have a KV cache of its own. So calls that touch state, kernels of other libraries, and calls that compute sizes
    stay with ExecuTorch, whose arenas the methods share.
    """

    def __init__(self, inner: Any, support: Support, *, symbolic_arguments: bool) -> None:
        """Wrap `inner`, the back end's own partitioner.

        It says what must not be decomposed and how its back end is configured; `support` is asked about each call.
        Without `symbolic_arguments` calls that take sizes stay outside too.
        """
        super().__init__()
        self._inner = inner
        self._support = support
        self._symbolic_arguments = symbolic_arguments
        self.reasons: dict[tuple[str, str], str] = {}

    def ops_to_not_decompose(self, ep: ExportedProgram) -> Any:
        """Return the operators that the back end takes whole, without those of calls that stay outside."""
        wanted, takes = self._inner.ops_to_not_decompose(ep)
        rules = _Rules(ep, self._symbolic_arguments)
        outside = {node.target for node in calls(ep.graph_module) if rules.refusal(node) is not None}
        return [one for one in wanted if one not in outside], takes

    def partition(self, exported_program: ExportedProgram) -> PartitionResult:
        """Tag the calls that go into delegates, and note the reasons for the others."""
        chosen = _Chosen(_Rules(exported_program, self._symbolic_arguments), self._support)
        proposed = CapabilityBasedPartitioner(
            exported_program.graph_module, chosen, allows_single_node_partition=True
        ).propose_partitions()
        tags: Mapping[str, DelegationSpec] = {f"tag{one.id}": self._inner.delegation_spec for one in proposed}
        for one in proposed:
            for node in one.nodes:
                node.meta["delegation_tag"] = f"tag{one.id}"
        tag_constant_data(exported_program)
        for node in calls(exported_program.graph_module):
            if "delegation_tag" not in node.meta:
                self.reasons[reason_key(node)] = chosen.reasons.get(
                    node, "it would make the delegates wait in a circle"
                )
        return PartitionResult(tagged_exported_program=exported_program, partition_tags=dict(tags))


class _Rules:
    """What no back end gets, whatever it supports."""

    def __init__(self, exported: ExportedProgram, symbolic_arguments: bool) -> None:
        changed = mutated_buffers(exported)
        self._state = {name for name, buffer in bound_names(exported).items() if buffer in changed}
        self._symbolic_arguments = symbolic_arguments

    def refusal(self, node: Node) -> str | None:
        """Return why `node` stays outside, or None."""
        general = general_reason(node)
        if general is not None:
            return general
        if any(used.op == "placeholder" and used.name in self._state for used in node.all_input_nodes):
            return IN_SHARED_STATE
        if not self._symbolic_arguments and not all(_is_tensor(used.meta.get("val")) for used in node.all_input_nodes):
            return SYMBOLIC
        return None


class _Chosen(OperatorSupportBase):
    """The calls that a back end gets, of those it supports."""

    def __init__(self, rules: _Rules, support: Support) -> None:
        self._rules = rules
        self._support = support
        self.reasons: dict[Node, str] = {}

    def is_node_supported(self, submodules: Mapping[str, torch.nn.Module], node: Node) -> bool:
        if node.op != "call_function":
            return node.op == "get_attr"
        reason = self._rules.refusal(node) or self._support(node)
        if reason is not None:
            self.reasons[node] = reason
        return reason is None


def _is_tensor(value: object) -> bool:
    return value is None or isinstance(value, (torch.Tensor, tuple, list))
