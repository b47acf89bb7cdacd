"""What holding passes to their contract costs: structural checks over the time of the graph passes alone.

::

    python -m triptych.benchmarks.structural_checks CHECKPOINT --layers 8 16 30

For each number of layers the model is cut and captured once (not measured); then the graph passes run `repeats`
times, and the medians are shown. As in `timeit` the garbage collector is off while they run, for a full collection
falls on passes and checks by chance. The passes' time is what they spend on rewriting, graphs copied and rebuilt
included; the checks' time is verification, fingerprints and everything else that the manager does beside. A pass
that matches nothing anywhere is measured alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from triptych.compiler import manager
from triptych.compiler.adapters.hugging_face import load
from triptych.compiler.model import Model
from triptych.compiler.pipeline import as_pipeline
from triptych.compiler.shrinking import cut_stacks
from triptych.compiler.stages import Source

MAX_CONTEXT: Final = 512
PASSES: Final = "remove-no-op-casts,fold-rms-norm,last-token-logits,legalize-executorch"
WITHOUT_MATCH: Final = "expand-tanh-gelu"


@dataclass(frozen=True)
class Row:
    """Medians for one number of layers, in seconds."""

    layers: int
    nodes: int
    passes: float
    checks: float
    without_match: float

    @property
    def ratio(self) -> float:
        """Checks over passes."""
        return self.checks / self.passes


def measure(model: Model, layers: int, repeats: int) -> Row:
    """Measure `model` cut to `layers`."""
    source = Source(cut_stacks(model, layers)).transform("static-kv-cache,swap-sdpa")
    program = source.capture().program
    passes, checks, idle = [], [], []
    for repeat in range(repeats + 1):
        gc.collect()
        gc.disable()
        _, results = manager.run_program(program, as_pipeline(PASSES).program)
        _, (nothing,) = manager.run_program(program, as_pipeline(WITHOUT_MATCH).program)
        gc.enable()
        if repeat:  # the first run warms caches up
            passes.append(sum(one.seconds for one in results))
            checks.append(sum(one.check_seconds for one in results))
            idle.append(nothing.seconds + nothing.check_seconds)
    nodes = sum(len(method.exported.graph.nodes) for method in program.methods.values())
    return Row(layers, nodes, statistics.median(passes), statistics.median(checks), statistics.median(idle))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table, and JSON where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a local Hugging Face decoder")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 30], help="numbers of layers to measure")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each; medians are shown")
    parser.add_argument("--json", type=Path, default=None, help="write the rows into this file too")
    options = parser.parse_args(arguments)
    model = load(options.checkpoint, max_context=MAX_CONTEXT)
    rows = [measure(model, layers, options.repeats) for layers in options.layers]
    out = sys.stdout.write
    out("| layers | nodes | passes ms | checks ms | checks / passes | checks ms a layer | no match ms |\n")
    out("|---|---|---|---|---|---|---|\n")
    for row in rows:
        out(
            f"| {row.layers} | {row.nodes} | {row.passes * 1e3:.0f} | {row.checks * 1e3:.0f} | {row.ratio:.1%} | "
            f"{row.checks / row.layers * 1e3:.2f} | {row.without_match * 1e3:.0f} |\n"
        )
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
