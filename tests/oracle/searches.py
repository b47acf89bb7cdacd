"""What the tests of bisection and of what follows it share."""

from typing import Final

from triptych.compiler.bisect import Culprit, bisect
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import Pass
from triptych.compiler.pipeline import Pipeline, as_pipeline, build

FIRST: Final = "static-kv-cache,swap-sdpa,capture,last-token-logits"


def pipeline_of(*passes: Pass, first: str = FIRST) -> Pipeline:
    """Put graph and program passes between right ones."""
    start = as_pipeline(first)
    return build([*start.source, None, *start.program, *passes, *as_pipeline("capture,legalize-aten").program])


def guilty(model: Model, oracle: Oracle, pipeline: Pipeline) -> Culprit:
    """Search where something is known to be guilty."""
    culprit = bisect(model, pipeline, oracle)
    assert culprit is not None
    return culprit
