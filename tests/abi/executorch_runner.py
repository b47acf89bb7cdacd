"""What the tests ask of ExecuTorch's own runners, which may abort the process and so get one of their own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

SCRIPT: Final = Path(__file__).with_name("runner_process.py")
MARK: Final = "---- request"
PREFILL_CALL: Final = "Prefill token result numel()"
"""What `TextPrefiller` logs after each call of several tokens, and not where it goes token by token."""

Input = str | Tensor | list[int]


@dataclass(frozen=True)
class Request:
    """Text, pixel values and token ids in order, and the number of tokens wanted."""

    inputs: tuple[Input, ...]
    max_new_tokens: int = 48


@dataclass(frozen=True)
class Answer:
    """What a runner made of a request: text piece by piece as it came, or an error, and what it logged."""

    pieces: tuple[str, ...]
    prompt_tokens: int
    error: str | None
    log: str

    @property
    def text(self) -> str:
        """The pieces together."""
        return "".join(self.pieces)

    @property
    def prefill_calls(self) -> int:
        """How many calls of several tokens took in the prompt."""
        return self.log.count(PREFILL_CALL)


@dataclass(frozen=True)
class Outcome:
    """How the process ended, and what it answered until then."""

    code: int
    answers: tuple[Answer, ...]
    log: str


def run(kind: Literal["text", "multimodal"], artifact: Path, requests: Sequence[Request]) -> Outcome:
    """Let `TextLLMRunner` or `MultimodalRunner` answer `requests` over the ``.pte`` in `artifact`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written = [
            {"inputs": [_written(one, folder) for one in request.inputs], "max_new_tokens": request.max_new_tokens}
            for request in requests
        ]
        (folder / "requests.json").write_text(json.dumps(written), encoding="utf-8")
        files = [artifact / "model.pte", artifact / "tokenizer.json", folder / "requests.json", folder / "results"]
        command = [sys.executable, str(SCRIPT), kind, *map(str, files), MARK]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        results = (folder / "results").read_text(encoding="utf-8").splitlines()
    logs = done.stderr.split(MARK)[1:]
    answers = []
    for line, log in zip(results, logs, strict=False):
        found = json.loads(line)
        answers.append(Answer(tuple(found["pieces"]), found["prompt_tokens"], found["error"], log))
    return Outcome(done.returncode, tuple(answers), done.stderr)


def answers(kind: Literal["text", "multimodal"], artifact: Path, requests: Sequence[Request]) -> tuple[Answer, ...]:
    """Return the answers of a process that ended well, one a request."""
    outcome = run(kind, artifact, requests)
    assert outcome.code == 0, outcome.log[-2000:]
    assert len(outcome.answers) == len(requests)
    return outcome.answers


def _written(value: Input, folder: Path) -> tuple[str, object]:
    if isinstance(value, str):
        return "text", value
    if isinstance(value, Tensor):
        path = folder / f"{len(list(folder.iterdir()))}.pt"
        torch.save(value, path)
        return "image", str(path)
    return "tokens", value
