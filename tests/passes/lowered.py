"""Parity of what a target makes of a pipeline, by the oracle's own traces."""

from pathlib import Path

from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import Tolerance
from triptych.compiler.stages import Source
from triptych.runtime.loaders import load_runner
from triptych.testing.checks import default_oracle


def assert_lowered_parity(
    model: Model,
    passes: str,
    target: str,
    folder: Path,
    *,
    declared: Tolerance | None = None,
    oracle: Oracle | None = None,
) -> None:
    """Lower `model` after the source transforms `passes`, load the artifact and hold it to every trace."""
    captured = Source(model).transform(passes).capture().rewrite("last-token-logits")
    artifact = captured.lower(target).save(folder / "artifact")
    methods = {role: name for name, method in artifact.manifest.methods.items() for role in method.roles}
    with load_runner(artifact.path, artifact.manifest) as runner:
        for report in (oracle or default_oracle(model)).judge(runner, methods, declared=declared, perturbed=True):
            assert report.passed, f"{report.trace}: {report.failures} {report.unseen}"
