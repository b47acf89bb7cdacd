"""What lowering to a ``.pte`` costs: our flow against ExecuTorch's plain one, on one captured program.

::

    python -m triptych.benchmarks.export_cost CHECKPOINT --layers 4 8 16

Each measurement has its own process, and the two flows take turns. A process loads the checkpoint, cuts it to the
number of layers, quantizes and captures it (not measured), and then takes the captured program to a file on disk:

- *plain* legalizes to ExecuTorch's operators and calls `to_edge_transform_and_lower` and `to_executorch`,
- *ours* is ``Captured.rewrite(passes).lower("xnnpack").save(…)`` with the passes of the default pipeline.

Both lower the methods token_embedding, prefill (any length up to the context) and decode. Seconds are wall-clock and,
in brackets, CPU; medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

FLOWS: Final = ("plain", "ours")


@dataclass(frozen=True)
class Run:
    """One flow on one program: seconds, bytes, and the delegates that the file holds by method."""

    flow: str
    layers: int
    wall: float
    cpu: float
    size: int
    delegates: dict[str, int]
    peak_memory: int


def measure(flow: str, checkpoint: Path, layers: int, recipe: str, context: int) -> Run:
    """Capture a model in this process and lower it by one flow."""
    from triptych.api import default_pipeline
    from triptych.compiler.adapters.hugging_face import load
    from triptych.compiler.pipeline import as_pipeline
    from triptych.compiler.shrinking import cut_stacks
    from triptych.compiler.stages import Source
    from triptych.compiler.targets.executorch import PTE_FILE
    from triptych.compiler.targets.pte import read_pte

    pipeline = as_pipeline(default_pipeline(context, recipe))
    model = cut_stacks(load(checkpoint, max_context=context), layers)
    captured = Source(model).transform(pipeline.source).capture()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "artifact"
        wall, cpu = time.perf_counter(), time.process_time()
        if flow == "plain":
            out.mkdir()
            _lower_plainly(captured.program, out / PTE_FILE)
        else:
            captured.rewrite(pipeline.program).lower("xnnpack").save(out)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        file = read_pte(out / PTE_FILE)
        return Run(
            flow,
            layers,
            wall,
            cpu,
            (out / PTE_FILE).stat().st_size,
            {name: sum(method.delegates.values()) for name, method in file.methods.items()},
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )


def _lower_plainly(program: Any, file: Path) -> None:
    """Lower as ExecuTorch's documentation does, with the settings that state shared between methods needs."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    from triptych.compiler import manager
    from triptych.compiler.pipeline import as_pipeline

    passes = as_pipeline("last-token-logits,legalize-executorch,expand-tanh-gelu").program
    program, _ = manager.run_program(program, passes)
    lowered = to_edge_transform_and_lower(
        {name: method.exported for name, method in program.methods.items()},
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    ).to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            do_quant_fusion_and_const_prop=True,
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=True, alloc_graph_input=False),
        )
    )
    with file.open("wb") as stream:
        lowered.write_to_file(stream)


def _in_own_process(flow: str, options: argparse.Namespace, layers: int) -> Run:
    command = [sys.executable, "-m", "triptych.benchmarks.export_cost", str(options.checkpoint), "--flow", flow]
    command += ["--layers", str(layers), "--recipe", options.recipe, "--context", str(options.context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (this very module)
    if done.returncode != 0:
        raise SystemExit(f"{flow} at {layers} layers failed:\n{done.stderr[-2000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


def _table(runs: Sequence[Run]) -> str:
    lines = [
        "| layers | plain s | ours s | ratio (CPU) | delegates plain | ours | MB plain | ours | GB plain | ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for layers in sorted({run.layers for run in runs}):
        plain, ours = ([run for run in runs if (run.layers, run.flow) == (layers, flow)] for flow in FLOWS)
        plain_wall, wall = (statistics.median(run.wall for run in flow) for flow in (plain, ours))
        plain_cpu, cpu = (statistics.median(run.cpu for run in flow) for flow in (plain, ours))
        cells = [
            str(layers),
            f"{plain_wall:.1f} ({plain_cpu:.1f})",
            f"{wall:.1f} ({cpu:.1f})",
            f"{plain_wall / wall:.1f} ({plain_cpu / cpu:.1f})",
            *(" + ".join(str(count) for count in one[0].delegates.values() if count) for one in (plain, ours)),
            *(f"{one[0].size / 1e6:.1f}" for one in (plain, ours)),
            *(f"{one[0].peak_memory / 1e9:.1f}" for one in (plain, ours)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both flows and print a table, and JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a local Hugging Face decoder")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16], help="numbers of layers to measure")
    parser.add_argument("--recipe", default="8da4w", help="quantization recipe (default: 8da4w)")
    parser.add_argument("--context", type=int, default=2048, help="positions the program is built for (default: 2048)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each flow; medians are shown")
    parser.add_argument("--json", type=Path, default=None, help="write the runs into this file too")
    parser.add_argument("--flow", choices=FLOWS, default=None, help="measure one flow in this process, print JSON")
    options = parser.parse_args(arguments)
    out = sys.stdout.write
    if options.flow is not None:
        for layers in options.layers:
            run = measure(options.flow, options.checkpoint, layers, options.recipe, options.context)
            out(json.dumps(asdict(run)) + "\n")
        return
    runs = []
    for layers in options.layers:
        for _ in range(options.repeats):
            for flow in FLOWS:
                runs.append(_in_own_process(flow, options, layers))
                sys.stderr.write(f"{flow}, {layers} layers: {runs[-1].wall:.1f} s\n")
    out(_table(runs) + "\n")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
