"""A self-check before lowering: does decode go on from where prefill stopped?

Capture cannot know what keeps a model's past: an attention that no pass could reach, a convolution over time
or a branch on the sequence length export without complaint and compute something else with a split input. So
each program is run once: one prefill of a few tokens must agree with a shorter prefill and single steps.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.errors import ModelError
from triptych.manifest import token_ids

LENGTH: Final = 8
SPLITS: Final = (1, 5)
QUANTIZED_LENGTH: Final = 4
QUANTIZED_SPLITS: Final = (1,)
"""Fewer calls: in eager torch quantized arithmetic is slow."""
FLOAT_TOLERANCE: Final = 1e-3
QUANTIZED_TOLERANCE: Final = 0.5
"""Relative to the largest logit. Dynamic int8 activations that round the other way move logits this far at most."""


def check_continuation(program: Program, *, quantized: bool) -> None:
    """Raise `ModelError` where splitting a sequence between prefill and decode changes the logits.

    Programs without the roles prefill and decode, or whose methods take more inputs than the ABI's, are left alone.
    """
    embedding = _only(program, "token_embedding", ["tokens"])
    prefill = _only(program, "prefill", ["embeds", "start_pos"], ["tokens", "start_pos"])
    decode = _only(program, "decode", ["embeds", "start_pos"], ["tokens", "start_pos"])
    longest, splits = (QUANTIZED_LENGTH, QUANTIZED_SPLITS) if quantized else (LENGTH, SPLITS)
    length = min(longest, program.metadata.max_context)
    if prefill is None or decode is None or length < 2:
        return
    contents = {name: program.methods[name].inputs[0].name for name in (prefill, decode)}
    if embedding is None and "embeds" in contents.values():
        return
    generator = torch.Generator().manual_seed(0)
    kept = program.metadata.kept_tokens
    known = torch.arange(program.metadata.vocab_size) if kept is None else torch.tensor(token_ids(kept))
    tokens = known[torch.randint(0, len(known), (1, length), generator=generator)]
    runner = ProgramRunner(program)
    given = {"tokens": tokens}
    if embedding is not None:
        (given["embeds"],) = (value.clone() for value in runner.run(embedding, tokens=tokens).values())

    def run(method: str, start: int, stop: int) -> Tensor:
        content = contents[method]
        outputs = runner.run(method, **{content: given[content][:, start:stop]}, start_pos=torch.tensor([start]))
        return _last(next(iter(outputs.values())))

    whole = run(prefill, 0, length)
    for split in (one for one in splits if one < length):
        runner.reset_state()
        run(prefill, 0, split)
        for position in range(split, length):
            parts = run(decode, position, position + 1)
        difference = _difference(parts, whole, known)
        if not difference <= (QUANTIZED_TOLERANCE if quantized else FLOAT_TOLERANCE):
            raise ModelError(
                f"decode does not go on from prefill: {length} tokens at once and {split} followed by single steps "
                f"differ by {difference:.2g} of the largest logit; some part of the model keeps no past "
                "(is static-kv-cache in the pipeline, and does it reach every attention?)"
            )


def _only(program: Program, kind: str, *inputs: list[str]) -> str | None:
    """Return the name of the one method of a kind, where it takes one of these lists of inputs."""
    found = list(program.methods_with(kind))
    return found[0][0] if len(found) == 1 and [port.name for port in found[0][1].inputs] in inputs else None


def _last(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])[-1]


def _difference(parts: Tensor, whole: Tensor, known: Tensor) -> float:
    """Return how far logits differ on the tokens `known`, or how far a chosen token's lies below the best."""
    scale = whole[known].abs().max().clamp_min(1e-12)
    if not parts.is_floating_point():
        return float((whole.max() - whole[int(parts)]) / (2 * scale))
    return float((parts - whole)[known].abs().max() / scale)
