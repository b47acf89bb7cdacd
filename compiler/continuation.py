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

LENGTH: Final = 8
SPLITS: Final = (1, 5)
FLOAT_TOLERANCE: Final = 1e-3
QUANTIZED_TOLERANCE: Final = 0.5
"""Relative to the largest logit. Dynamic int8 activations that round the other way move logits this far at most."""


def check_continuation(program: Program, *, quantized: bool) -> None:
    """Raise `ModelError` where splitting a sequence between prefill and decode changes the logits.

    Programs without the roles token_embedding, prefill and decode, or whose methods take more inputs than
    the ABI's, are left alone.
    """
    embedding = _only(program, "token_embedding", ["tokens"])
    prefill = _only(program, "prefill", ["embeds", "start_pos"])
    decode = _only(program, "decode", ["tokens", "start_pos"])
    length = min(LENGTH, program.metadata.max_context)
    if embedding is None or prefill is None or decode is None or length < 2:
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, program.metadata.vocab_size, (1, length), generator=generator)
    embed, run_prefill, run_decode = (
        method.exported.module(check_guards=False) for method in (embedding, prefill, decode)
    )
    with torch.no_grad(), _state_put_back(program) as put_back:
        embeds = embed(tokens)
        whole = _last(run_prefill(embeds, torch.tensor([0])))
        for split in (one for one in SPLITS if one < length):
            put_back()
            run_prefill(embeds[:, :split], torch.tensor([0]))
            for position in range(split, length):
                parts = _last(run_decode(tokens[:, position : position + 1], torch.tensor([position])))
            difference = float((parts - whole).abs().max() / whole.abs().max().clamp_min(1e-12))
            if not difference <= (QUANTIZED_TOLERANCE if quantized else FLOAT_TOLERANCE):
                raise ModelError(
                    f"decode does not go on from prefill: {length} tokens at once and {split} followed by single steps "
                    f"differ by {difference:.2g} of the largest logit; some part of the model keeps no past "
                    "(is static-kv-cache in the pipeline, and does it reach every attention?)"
                )


def _only(program: Program, kind: str, inputs: list[str]) -> Method | None:
    found = [method for _, method in program.methods_with(kind)]
    return found[0] if len(found) == 1 and [port.name for port in found[0].inputs] == inputs else None


def _last(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])[-1]


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
