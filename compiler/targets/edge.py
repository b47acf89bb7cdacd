"""From captured methods to ExecuTorch's edge dialect, with each method decomposed once.

`to_edge_transform_and_lower` traces every method three times: to make it functional, to decompose what the partitioner
does not ask for whole, and once more behind renamed operators, for the calls that the partitioner asks for and does not
take after all. The first two are one, and the third changes nothing where it takes them all, which is the rule. It
remains for methods in which it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.export import ExportedProgram


def to_edge_transform_and_lower(
    methods: Mapping[str, ExportedProgram], partitioner: Any, constant_methods: Mapping[str, Any]
) -> Any:
    """Return the `EdgeProgramManager` of `methods`, lowered by `partitioner` where that is not None.

    Raises `RuntimeError` for a call that the partitioner asked to be kept whole and then left.
    """
    from executorch.exir import EdgeCompileConfig, EdgeProgramManager
    from executorch.exir.program import _program as executorch

    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    edge: dict[str, ExportedProgram] = {}
    preserved: set[Any] = set()
    for name, exported in methods.items():
        decomposed, kept = _decompose(name, exported, partitioner)
        edge[name] = executorch._generate_edge_program(config, decomposed, preserve_ops=list(kept))
        preserved |= kept
    ordered = sorted(preserved, key=str)
    config._core_aten_ops_exception_list = ordered
    manager = EdgeProgramManager(edge, dict(constant_methods), config, ordered)
    if partitioner is None:
        return manager
    lowered = manager.to_backend(partitioner)
    for name in methods:
        program = lowered.exported_program(name)
        wanted, takes = partitioner.ops_to_not_decompose(program)
        whole = executorch._remove_invalid_ops_for_not_decompose(wanted)
        executorch._sanity_check_graph_for_non_decomp_ops(
            name, program, set(whole), takes, generate_error=True, partitioner_name=type(partitioner).__name__
        )
    return lowered


def _decompose(name: str, exported: ExportedProgram, partitioner: Any) -> tuple[ExportedProgram, set[Any]]:
    """Return the method in core aten, but for the calls that `partitioner` takes whole, and their operators."""
    from executorch.exir.program import _program as executorch

    table = executorch._default_decomposition_table()
    if partitioner is None:
        return exported.run_decompositions(table), set()
    wanted, takes = partitioner.ops_to_not_decompose(exported)
    whole: Sequence[Any] = wanted if takes is None else executorch._remove_invalid_ops_for_not_decompose(wanted)
    for operator in whole:
        table.pop(operator, None)
    decomposed = exported.run_decompositions(table)
    asked_for = set(whole)
    calls = [node for node in decomposed.graph.nodes if node.op == "call_function" and node.target in asked_for]
    if takes is None or all(takes(call) for call in calls):
        return decomposed, {call.target for call in calls}
    kept = set(executorch._replace_aten_ops_with_transformed_ops(name, decomposed, {name: [partitioner]}) or ())
    decomposed = decomposed.run_decompositions(executorch._default_decomposition_table())
    executorch._restore_transformed_ops_to_aten_ops(decomposed)
    return decomposed, kept
