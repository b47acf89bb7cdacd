"""Emitting one ``.pte`` with all methods, shared state and shared weights; `portable` and `xnnpack` build on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch.export import ExportedProgram

from triptych.compiler.editing import bound_names, copy_graph_module, mutated_buffers, rebuild
from triptych.compiler.program import Program
from triptych.compiler.targets.custom_ops import register_llama_operators
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


def lower(program: Program, manifest: Manifest, partitioners: Sequence[Any], report: Callable[[str], None]) -> PteBytes:
    """Lower every method of `program` and put them in one file.

    1. Mutable buffers of one name get one place in one arena (`share_mutable_buffers`), and their names are
       emitted, so the state is shared and reachable.
    2. Equal weights are stored once by ExecuTorch's named data and constant segments.
    3. The manifest without hashes travels as the constant method ``triptych_manifest``.

    Raises `LoweringError` for state that a method only reads, for quantized layers left without a kernel, and
    where ExecuTorch itself gives up.
    """
    register_llama_operators()
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    _refuse_read_only_state(program)
    methods = {name: _stripped(method.exported) for name, method in program.methods.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report("partition")
            edge = to_edge_transform_and_lower(
                methods,
                partitioner={name: list(partitioners) for name in methods},
                compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
                constant_methods={MANIFEST_METHOD: manifest.without_hashes().to_json()},
            )
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


def _stripped(exported: ExportedProgram) -> ExportedProgram:
    """Return a copy whose nodes carry values and no source history: lowering copies metadata at every step."""
    graph_module = copy_graph_module(exported)
    for node in graph_module.graph.nodes:
        node.meta = {key: node.meta[key] for key in KEPT_METADATA if key in node.meta}
    return rebuild(exported, graph_module)


def _refuse_read_only_state(program: Program) -> None:
    for row in program.state.values():
        for name, method in program.methods.items():
            if row.name in bound_names(method.exported).values() and row.name not in mutated_buffers(method.exported):
                raise LoweringError(
                    f"method {name} reads the state {row.name} and never writes it: ExecuTorch would freeze it as a "
                    "constant; write it in that method too"
                )


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
