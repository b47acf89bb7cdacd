"""The whole SmolLM2-135M-Instruct at 8da4w in ExecuTorch's own `TextLLMRunner`."""

from pathlib import Path

import pytest

import triptych
from tests.abi.executorch_runner import Request, answers
from tests.real.smollm2 import CONTEXT, QUESTION
from triptych.manifest import Manifest
from triptych.runtime.chat import render_chat, user_message

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def artifact(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "executorch-llm-8da4w"
    export = triptych.export(
        smollm2, out=out, target="xnnpack", recipe="8da4w", max_context=CONTEXT, abi="executorch-llm"
    )
    return export.path


def test_it_answers_rome_and_ends(artifact: Path) -> None:
    """The runner takes text as it is, so whoever calls it renders the chat template and names no BOS."""
    prompt = render_chat([user_message(QUESTION, [], parts=False)], Manifest.load(artifact).chat)
    short, long = answers("text", artifact, [Request((prompt,), 64), Request(("A ship left at dawn. " * 60,), 2)])
    assert "Rome" in short.text
    assert short.pieces[-1] == "<|im_end|>"
    assert (short.prefill_calls, long.prefill_calls) == (1, 1)
    with triptych.load(artifact) as runner:
        assert runner.generate(QUESTION, max_new_tokens=64).text == short.text.removesuffix("<|im_end|>")
