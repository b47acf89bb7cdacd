"""Emitting one ``.pte`` with all methods, shared state and shared weights; `portable` and `xnnpack` build on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.export import ExportedProgram

from triptych.compiler.abi import constant_methods
from triptych.compiler.editing import bound_names, copy_graph_module, mutated_buffers, rebuild
from triptych.compiler.partition_explainer import tag
from triptych.compiler.program import Program
from triptych.compiler.targets.custom_ops import register_llama_operators
from triptych.compiler.targets.edge import to_edge_transform_and_lower
from triptych.compiler.targets.needed_passes import needed_passes_only
from triptych.errors import LoweringError, TriptychError
from triptych.manifest import Manifest

PTE_FILE: Final = "model.pte"
MANIFEST_METHOD: Final = "triptych_manifest"
KEPT_METADATA: Final = ("val", "unbacked_bindings", "tensor_meta")


@dataclass(frozen=True)
class PteBytes:
    """An emitted program, still in memory."""

    manager: Any

    def write(self, folder: Path) -> None:
        """Write ``model.pte``."""
        with (folder / PTE_FILE).open("wb") as stream:
            self.manager.write_to_file(stream)


def lower(program: Program, manifest: Manifest, partitioner: Any, report: Callable[[str], None]) -> PteBytes:
    """Lower every method of `program` and put them in one file.

    1. Mutable buffers of one name get one place in one arena (`share_mutable_buffers`), and their names are
       emitted, so the state is shared and reachable. State that a method only reads is no exception.
    2. Equal weights are stored once by ExecuTorch's named data and constant segments.
    3. The manifest without hashes travels as the constant method ``triptych_manifest``, beside what the program's ABI
       asks for.

    Raises `LoweringError` for quantized layers left without a kernel, and where ExecuTorch itself gives up.
    """
    register_llama_operators()
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    from triptych.compiler.targets.partitioners import dynamic_slices

    written = {name: _with_state_written(program, method.exported) for name, method in program.methods.items()}
    methods = {name: _stripped(name, exported) for name, exported in written.items()}
    try:
        with warnings.catch_warnings(), needed_passes_only(), dynamic_slices():
            warnings.simplefilter("ignore")
            report("partition")
            constants = {MANIFEST_METHOD: manifest.without_hashes().to_json(), **constant_methods(program)}
            edge = to_edge_transform_and_lower(methods, partitioner, constants)
            _refuse_undelegated_quantization({name: edge.exported_program(name) for name in methods})
            report("emit")
            lowered = edge.to_executorch(
                ExecutorchBackendConfig(
                    emit_mutable_buffer_names=True,
                    extract_delegate_segments=True,
                    do_quant_fusion_and_const_prop=True,
                    sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                    memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True, alloc_graph_input=False),
                )
            )
    except TriptychError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoweringError(
            f"ExecuTorch could not lower the program: {type(error).__name__}: {reason}; see the chained error"
        ) from error
    return PteBytes(lowered)


def _stripped(method: str, exported: ExportedProgram) -> ExportedProgram:
    """Return a copy whose nodes carry values, and a short tag in place of their source history.

    Lowering copies metadata at every step; the tag lets the partition explainer find the captured node again.
    """
    graph_module = copy_graph_module(exported)
    for node in graph_module.graph.nodes:
        node.meta = {key: node.meta[key] for key in KEPT_METADATA if key in node.meta}
        node.meta["stack_trace"] = tag(method, node)
    return rebuild(exported, graph_module)


def _with_state_written(program: Program, exported: ExportedProgram) -> ExportedProgram:
    """Return `exported` with each state row that it only reads written back to itself.

    ExecuTorch takes a buffer that a method does not write for a constant, and a delegate may swallow its value at
    export. A row that is written is a mutable buffer; that it is written with itself, ExecuTorch finds out while it
    makes the program functional, so no copy is emitted. Where a delegate would still freeze the row, it refuses.
    """
    names = {fqn: argument for argument, fqn in bound_names(exported).items()}
    only_read = [row for row in program.state if row in names and row not in mutated_buffers(exported)]
    if not only_read:
        return exported
    graph_module = copy_graph_module(exported)
    placeholders = {node.name: node for node in graph_module.graph.nodes if node.op == "placeholder"}
    with graph_module.graph.inserting_before(graph_module.graph.output_node()):
        for row in only_read:
            node = placeholders[names[row]]
            written = graph_module.graph.call_function(torch.ops.aten.copy_.default, (node, node))
            written.meta["val"] = node.meta["val"]
    graph_module.recompile()
    return rebuild(exported, graph_module)


def _refuse_undelegated_quantization(methods: dict[str, Any]) -> None:
    """An 8da4w linear outside a delegate has no kernel and would fail in the middle of a run."""
    for name, exported in methods.items():
        for node in exported.graph.nodes:
            if "choose_qparams_affine" in str(node.target):
                users = ", ".join(user.name for user in node.users) or "nothing"
                raise LoweringError(
                    f"method {name}: the quantized layer at {node.name} (used by {users}) was not delegated and no "
                    "kernel runs it alone; use recipe fp32 or the target eager"
                )
