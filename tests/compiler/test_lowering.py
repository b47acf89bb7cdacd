"""Our way to a ``.pte`` gives the file that ExecuTorch's own gives, byte for byte, with less work."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from tests.compiler.rules import S, captured
from triptych.compiler.manager import run_program
from triptych.compiler.pipeline import as_pipeline
from triptych.compiler.program import Program
from triptych.compiler.stages import Source
from triptych.compiler.targets.edge import to_edge_transform_and_lower
from triptych.compiler.targets.needed_passes import RELEVANT, needed_passes_only

LEGALIZED = "legalize-executorch,expand-tanh-gelu"


class Pictures(nn.Module):
    """What makes XNNPACK's passes work: convolutions, batch norms, pooling, copies, activations."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, stride=2)
        self.prelu = nn.PReLU(6)
        self.line = nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        x = F.max_pool2d(self.prelu(self.second(F.pad(x, (1, 1, 1, 1)))), 2, 2)
        x = torch.cat((x, x * 2, x.clone(), x + 1, F.hardtanh(x), x.neg()), dim=1)[:, :6]
        lines = self.line(x.flatten(2)).mean(-1)
        return self.head(lines).softmax(-1).to(torch.float32)


class Integers(nn.Module):
    """What makes the passes to the edge dialect work: mixed types, numbers for tensors, sizes for tensors."""

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        return (x.t().t()[0] * positions + 2) / (positions + x.shape[1]) + torch.minimum(x[0], positions.float())


def plain(program: Program) -> bytes:
    """Lower by ExecuTorch's own functions."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig
    from executorch.exir import to_edge_transform_and_lower as whole

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edge = whole(
            {name: method.exported for name, method in program.methods.items()},
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods={"answer": 42},
        )
        return bytes(edge.to_executorch(config()).buffer)


def ours(program: Program) -> bytes:
    """Lower by our flow."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    methods = {name: method.exported for name, method in program.methods.items()}
    with warnings.catch_warnings(), needed_passes_only():
        warnings.simplefilter("ignore")
        edge = to_edge_transform_and_lower(methods, XnnpackPartitioner(), {"answer": 42})
        return bytes(edge.to_executorch(config()).buffer)


def config() -> Any:
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    return ExecutorchBackendConfig(
        do_quant_fusion_and_const_prop=True,
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True, alloc_graph_input=False),
    )


def legalized(program: Program) -> Program:
    """Legalize anew for each lowering: one leaves symbols behind in the environment that its graphs share."""
    return run_program(program, as_pipeline(LEGALIZED).program)[0]


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    torch.manual_seed(0)
    untied = tiny.tiny(tied=False, layers=1)
    quantized = Source(untied).transform("quantize{recipe=8da4w},static-kv-cache,swap-sdpa").capture()
    return {
        "decoder": tiny.captured(tiny.tiny(layers=1)).program,
        "quantized decoder": quantized.rewrite("last-token-logits").program,
        "pictures": captured(Pictures().eval(), (2, 3, 17, 12)),
        "integers": captured(Integers(), (4, S)),
    }


@pytest.mark.parametrize("name", ["decoder", "quantized decoder", "pictures", "integers"])
def test_the_file_is_the_same(programs: dict[str, Program], name: str) -> None:
    assert ours(legalized(programs[name])) == plain(legalized(programs[name]))


def test_the_passes_left_out_are_those_that_do_nothing(programs: dict[str, Program]) -> None:
    """Every entry of the table lets its pass run somewhere and keeps it from running elsewhere, but for a few."""
    asked = {name: set() for name in RELEVANT}  # type: ignore[var-annotated]
    for program in programs.values():
        for method in program.methods.values():
            calls = [node for node in method.exported.graph.nodes if node.op == "call_function"]
            for name, relevant in RELEVANT.items():
                asked[name].add(relevant(calls))
    assert all(False in answers for answers in asked.values())


def test_executorch_is_left_as_it_was() -> None:
    from executorch.backends.xnnpack._passes import XNNPACKPassManager
    from executorch.exir.pass_base import ExportPass

    def patched() -> tuple[Any, Any]:
        return XNNPACKPassManager.transform, ExportPass.__call__

    def fail_while_patched() -> None:
        with needed_passes_only():
            assert patched() != before
            raise RuntimeError

    before = patched()
    with pytest.raises(RuntimeError):
        fail_while_patched()
    assert patched() == before


def test_fewer_passes_run(programs: dict[str, Program], monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.exir.pass_base import ExportPass

    runs: list[str] = []
    trace = ExportPass.call

    def counted(one: Any, graph_module: Any) -> Any:
        runs.append(type(one).__name__)
        return trace(one, graph_module)

    monkeypatch.setattr(ExportPass, "call", counted)
    plain(legalized(programs["decoder"]))
    by_executorch = len(runs)
    runs.clear()
    ours(legalized(programs["decoder"]))
    assert 0 < 4 * len(runs) < by_executorch
