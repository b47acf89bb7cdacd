"""What the tests on the whole Gemma-3-270M share: a long real text, and the oracle that judges it."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle, TraceReport
from triptych.compiler.stages import Source
from triptych.compiler.trace import Step
from triptych.compiler.trace_plans import TracePlan
from triptych.manifest import Manifest
from triptych.runtime.loaders import load_runner

WINDOW: Final = 512
PROMPT: Final = 2000
DECODED: Final = 200
CONTEXT: Final = PROMPT + DECODED


@cache
def text_tokens(tokenizer_file: Path) -> tuple[int, ...]:
    """Return the beginning of Python's language reference as token ids, more of them than the context is long."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 16 * CONTEXT]
    return tuple(Tokenizer.from_file(str(tokenizer_file)).encode(text).ids)


def text_plan(model: Model, prompt: int = PROMPT, decoded: int = DECODED) -> TracePlan:
    """Return a plan of one prompt of real text, and `decoded` more positions of it."""
    assert model.tokenizer_file is not None
    tokens = partial(_excerpt, text_tokens(model.tokenizer_file), prompt + decoded)
    return TracePlan("language reference", (Step("prefill", prompt), Step("decode", decoded)), tokens)


def _excerpt(ids: tuple[int, ...], length: int, seed: int) -> Tensor:
    """Return `length` ids, the first of them that of the beginning of a text."""
    return torch.tensor([ids[0], *ids[1 + seed : length + seed]])


def judged(oracle: Oracle, cached: Source, target: str, folder: Path) -> TraceReport:
    """Export a model that has its caches for `target` and judge the artifact."""
    captured = cached.transform("swap-sdpa").capture().rewrite("last-token-logits")
    captured.lower(target).save(folder)
    manifest = Manifest.load(folder)
    methods = {role: name for name, method in manifest.methods.items() for role in method.roles}
    with load_runner(folder, manifest) as runner:
        (report,) = oracle.judge(runner, methods)
    return report
