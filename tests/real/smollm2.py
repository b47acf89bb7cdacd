"""What the tests on the whole SmolLM2-135M-Instruct share. One file a recipe, so that each is lowered once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

from triptych.compiler.targets.pte import read_pte
from triptych.inspection import inspect
from triptych.verification import VerifyReport

CONTEXT: Final = 512
QUESTION: Final = "What is the capital of Italy? Answer in one sentence."
LAYERS: Final = 30


def assert_answers_rome(artifact: Path) -> None:
    """`triptych run`, as a user would."""
    command = [sys.executable, "-m", "triptych", "run", str(artifact), "--prompt", QUESTION, "--json"]
    answer = subprocess.run([*command, "--max-new-tokens", "24"], capture_output=True, text=True, check=True)
    assert "Rome" in json.loads(answer.stdout)["text"]


def assert_methods_share_cache_and_weights(artifact: Path) -> None:
    """Read from the emitted file: the same arena offsets for every row, the same constant segments."""
    file = read_pte(artifact / "model.pte")
    prefill, decode = file.methods["prefill"], file.methods["decode"]
    assert len(prefill.state) == 2 * LAYERS
    assert prefill.state == decode.state
    assert prefill.weights == decode.weights
    assert inspect(artifact)["methods"]["decode"]["delegates"]


def failures(report: VerifyReport) -> dict[str, tuple[str, ...]]:
    """Return the first failures of each trace that did not pass, and what it could not see."""
    return {trace.trace: (*trace.failures[:3], *trace.unseen) for trace in report.traces if not trace.passed}
