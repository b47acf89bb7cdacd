"""A self-check before lowering: does decode go on from where prefill stopped?

Capture cannot know what keeps a model's past: an attention that no pass could reach, a convolution over time
or a branch on the sequence length export without complaint and compute something else with a split input. So
each program is run once: one prefill of a few tokens must agree with a shorter prefill and single steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from triptych.compiler.program import Method, Program
from triptych.errors import ModelError
from triptych.manifest import token_ids

LENGTH: Final = 8
SPLITS: Final = (1, 5)
QUANTIZED_LENGTH: Final = 4
QUANTIZED_SPLITS: Final = (1,)
"""Fewer calls, for in eager torch each of them turns every weight back into floats."""
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
    if embedding is None and "embeds" in (prefill.inputs[0].name, decode.inputs[0].name):
        return
    generator = torch.Generator().manual_seed(0)
    kept = program.metadata.kept_tokens
    known = torch.arange(program.metadata.vocab_size) if kept is None else torch.tensor(token_ids(kept))
    tokens = known[torch.randint(0, len(known), (1, length), generator=generator)]
    run_prefill, run_decode = (method.exported.module(check_guards=False) for method in (prefill, decode))
    with torch.no_grad(), _state_put_back(program) as put_back:
        embeds = None if embedding is None else embedding.exported.module(check_guards=False)(tokens)
        for_prefill, for_decode = (
            tokens if embeds is None or method.inputs[0].name == "tokens" else embeds for method in (prefill, decode)
        )
        whole = _last(run_prefill(for_prefill, torch.tensor([0])))
        for split in (one for one in splits if one < length):
            put_back()
            run_prefill(for_prefill[:, :split], torch.tensor([0]))
            for position in range(split, length):
                parts = _last(run_decode(for_decode[:, position : position + 1], torch.tensor([position])))
            difference = _difference(parts, whole, known)
            if not difference <= (QUANTIZED_TOLERANCE if quantized else FLOAT_TOLERANCE):
                raise ModelError(
                    f"decode does not go on from prefill: {length} tokens at once and {split} followed by single steps "
                    f"differ by {difference:.2g} of the largest logit; some part of the model keeps no past "
                    "(is static-kv-cache in the pipeline, and does it reach every attention?)"
                )


def _only(program: Program, kind: str, *inputs: list[str]) -> Method | None:
    found = [method for _, method in program.methods_with(kind)]
    return found[0] if len(found) == 1 and [port.name for port in found[0].inputs] in inputs else None


def _last(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])[-1]


def _difference(parts: Tensor, whole: Tensor, known: Tensor) -> float:
    """Return how far logits differ on the tokens `known`, or how far a chosen token's lies below the best."""
    scale = whole[known].abs().max().clamp_min(1e-12)
    if not parts.is_floating_point():
        return float((whole.max() - whole[int(parts)]) / (2 * scale))
    return float((parts - whole)[known].abs().max() / scale)


@contextmanager
def _state_put_back(program: Program) -> Iterator[Callable[[], None]]:
    """Give a function that puts the initial state back, and call it at the end."""
    before = {name: row.initial.clone() for name, row in program.state.items()}

    def put_back() -> None:
        for name, row in program.state.items():
            row.initial.copy_(before[name])

    try:
        yield put_back
    finally:
        put_back()
