"""What a lowered program runs in delegates and what it does not: each operator outside, with the reason and the line.

An ExecuTorch artifact carries the explanation as ``partition.json``, so it can be read without the model. It is made
while lowering, from the final graphs, and counts the same kernel calls as the ``.pte`` file has.
"""

from __future__ import annotations

import dataclasses
import json
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from triptych.compiler.program import Program
from triptych.compiler.provenance import source_line
from triptych.errors import ArtifactError

PARTITION_FILE: Final = "partition.json"
FORMAT: Final = "triptych-partition"
FORMAT_VERSION: Final = 1

Reasons = Mapping[tuple[str, str], str]
"""(tag of the captured node, name of the operator without overload) → why the partitioner left the call outside."""

NOT_A_TENSOR: Final = "it computes a size or a number, and delegates take and give tensors"
NO_DELEGATE: Final = "the target has no delegates"
WRITE_BACK: Final = "ExecuTorch added it to write a result into the state"
ADDED_LATE: Final = "ExecuTorch made it after partitioning, by fusing or copying"
_FREE: Final = ("alloc", "free")
_VIEW: Final = "executorch_prim::et_view.default"


@dataclass(frozen=True)
class OutsideOperator:
    """`count` calls of one operator outside of all delegates, for one reason.

    `operator` is named as in the file ("aten::add.out"); `lines` are the model's source lines behind the calls
    ("model.py:12"), in order, each once.
    """

    operator: str
    count: int
    reason: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class MethodPartition:
    """One method: its delegates by back end, how many operators are in them, and what is outside."""

    delegates: Mapping[str, int]
    delegated_operators: int
    outside: tuple[OutsideOperator, ...]

    @property
    def outside_calls(self) -> int:
        """The number of kernel calls outside."""
        return sum(one.count for one in self.outside)


@dataclass(frozen=True)
class Partition:
    """The explanation for one artifact: the target that lowered it, and its methods."""

    target: str
    methods: Mapping[str, MethodPartition]

    def to_json(self) -> str:
        """Return stable JSON text."""
        data = {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = PARTITION_FILE) -> Partition:
        """Parse JSON text; raises `ArtifactError` naming `where` on anything else."""
        try:
            data = json.loads(text)
            found = data["format"], data["version"]
            if found != (FORMAT, FORMAT_VERSION):
                raise ArtifactError(f"{where} has format {found[0]} {found[1]}, expected {FORMAT} {FORMAT_VERSION}")
            methods = {name: _method(method) for name, method in data["methods"].items()}
            return cls(str(data["target"]), methods)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{where} is damaged: {type(error).__name__} {error}; export again") from error

    @classmethod
    def load(cls, folder: Path) -> Partition:
        """Read the explanation in the artifact at `folder`; raises `ArtifactError` where it has none."""
        path = folder / PARTITION_FILE
        if not path.is_file():
            raise ArtifactError(
                f"{folder} has no {PARTITION_FILE}: only artifacts of ExecuTorch targets have one; "
                "export with such a target"
            )
        return cls.from_json(path.read_text(encoding="utf-8", errors="replace"), str(path))


def _method(data: Mapping[str, Any]) -> MethodPartition:
    outside = tuple(OutsideOperator(**{**one, "lines": tuple(one["lines"])}) for one in data["outside"])
    return MethodPartition(dict(data["delegates"]), int(data["delegated_operators"]), outside)


# ---------------------------------------------------------------------------------------------------- tags


def tag(method: str, node: Node) -> str:
    """Return the short text that stands for a captured node while it is lowered, in place of its source history.

    Lowering carries a node's ``stack_trace`` along to whatever it becomes, and nobody reads it there.
    """
    return f"{method}:{node.name}"


def tag_of(node: Node) -> str:
    """Return the tag of the captured node that became `node`; "" where lowering added it."""
    return str(node.meta.get("stack_trace") or "")


def reason_key(node: Node) -> tuple[str, str]:
    """Return the key of `node` in `Reasons`."""
    return tag_of(node), _schema_name(node.target)


# ---------------------------------------------------------------------------------------------------- explaining


def explain(
    target: str, program: Program, lowered: Mapping[str, ExportedProgram], reasons: Reasons | None
) -> Partition:
    """Explain the methods of `lowered`, graphs as they are emitted, made from `program`.

    `reasons` is what the partitioner said of the calls it left outside, None where there was no partitioner.
    """
    methods: dict[str, MethodPartition] = {}
    for name, method in program.methods.items():
        captured = {tag(name, node): node for node in method.exported.graph.nodes}
        methods[name] = _explain_method(lowered[name].graph_module, captured, reasons)
    return Partition(target, methods)


def _explain_method(
    graph_module: GraphModule, captured: Mapping[str, Node], reasons: Reasons | None
) -> MethodPartition:
    delegates: Counter[str] = Counter()
    inside = 0
    counts: Counter[tuple[str, str]] = Counter()
    lines: dict[tuple[str, str], dict[str, None]] = {}
    for node in calls(graph_module):
        delegate = _delegate(node)
        if delegate is not None:
            delegates[delegate.backend_id] += 1
            inside += sum(1 for _ in calls(delegate.original_module.graph_module))
            continue
        name = _kernel(node)
        if name is None:
            continue
        key = name, _reason(node, reasons)
        counts[key] += 1
        origin = captured.get(tag_of(node))
        line = source_line(origin) if origin is not None else None
        lines.setdefault(key, {}).update({line: None} if line is not None else {})
    outside = tuple(
        OutsideOperator(name, count, reason, tuple(lines[name, reason]))
        for (name, reason), count in counts.most_common()
    )
    return MethodPartition(dict(sorted(delegates.items())), inside, outside)


def calls(graph_module: GraphModule) -> Iterator[Node]:
    """Yield the calls of a graph and of the branches nested in it, but for the taking apart of tuples."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            yield node
        elif node.op == "get_attr":
            nested = getattr(graph_module, str(node.target), None)
            if isinstance(nested, GraphModule):
                yield from calls(nested)


def _delegate(node: Node) -> Any | None:
    """Return the lowered module that `node` calls, or None."""
    if getattr(node.target, "__name__", "") != "executorch_call_delegate":
        return None
    reference = node.args[0]
    assert isinstance(reference, Node)
    owner = reference.graph.owning_module
    return getattr(owner, str(reference.target))


def _kernel(node: Node) -> str | None:
    """Return the name of the kernel that a call becomes in the file; None where it becomes nothing."""
    name = getattr(node.target, "__name__", "")
    if not hasattr(node.target, "_schema"):
        if name == "view":
            return None if node.meta["spec"].is_static_shape_tensor else _VIEW
        return None if name in _FREE or isinstance(node.target, torch._ops.HigherOrderOperator) else name
    schema = node.target._schema
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def _schema_name(target: Any) -> str:
    if hasattr(target, "_schema"):
        return str(target._schema.name)
    name = str(getattr(target, "__name__", target))
    return "aten::view_copy" if name == "view" else name


def _reason(node: Node, reasons: Reasons | None) -> str:
    """Say why a call is outside: by what it is, else in the partitioner's words."""
    if reasons is None:
        return NO_DELEGATE
    general = general_reason(node)
    if general is not None:
        return general
    name = _schema_name(node.target)
    said = reasons.get((tag_of(node), name))
    if said is not None:
        return said
    return WRITE_BACK if name == "aten::copy_" else ADDED_LATE


def general_reason(node: Node) -> str | None:
    """Say why no partitioner is asked to take `node`, or return None."""
    namespace, separator, _ = _schema_name(node.target).partition("::")
    if separator and namespace not in TAKEN_NAMESPACES:
        return f"a kernel of {namespace}::, called as it is"
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return None if any(isinstance(part, torch.Tensor) for part in parts) else NOT_A_TENSOR


TAKEN_NAMESPACES: Final = ("aten", "dim_order_ops", "quantized_decomposed", "torchao", "executorch_prim")
"""Operators that partitioners know; what other libraries define is a kernel of its own."""
