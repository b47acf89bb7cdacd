"""`FakeRunner`: a tiny deterministic language model behind the `MethodRunner` seam, for tests.

It keeps the ABI of a real artifact, records every call and needs no files, so tests can count encoder calls and
compare ways to prefill. Its logits depend on every position before them, pictures included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from triptych.errors import RunError
from triptych.manifest import (
    CHOSEN_TOKEN,
    ChatSettings,
    DynamicDim,
    ImageSettings,
    Manifest,
    MethodSignature,
    ProgramFile,
    StateRow,
    TensorSignature,
)
from triptych.runtime.method_runner import Capabilities, MethodRunner

STATE_ROW: Final = "model.cache"
FILE: Final = "fake.program"
WIDTH: Final = 8
IMAGE_SIZE: Final = 8
IMAGE_TOKENS: Final = 4


def fake_manifest(
    *,
    vocab_size: int = 32,
    max_context: int = 64,
    image_token_id: int | None = 3,
    has_prefill: bool = True,
    all_logits: bool = False,
    extras: tuple[str, ...] = (),
    eos_ids: tuple[int, ...] = (),
    prefill_content: str = "embeds",
    has_prefill_first: bool = False,
    chooses_tokens: bool = False,
) -> Manifest:
    """Return the manifest of a tiny model.

    `image_token_id` None makes it text-only; without `has_prefill` prompts go through decode; `all_logits` lets
    prefill give [1, S, V] instead of [1, V]; `extras` are further inputs, int64 [1, S], of both methods.
    `prefill_content` is "embeds" or "tokens"; `has_prefill_first` adds a method for position 0; with `chooses_tokens`
    decode gives the most likely token.
    """
    positions = DynamicDim("S", 1, max_context)
    start = TensorSignature("start_pos", "int64", (1,), ("position",))
    tokens = TensorSignature("tokens", "int64", (1, positions), ("tokens",))
    embeds = TensorSignature("embeds", "float32", (1, positions, WIDTH))
    logits = TensorSignature("logits", "float32", (1, vocab_size), ("sampler",))
    every = TensorSignature("logits", "float32", (1, positions, vocab_size), ("sampler",))
    many = tuple(TensorSignature(name, "int64", (1, positions)) for name in extras)
    one = tuple(TensorSignature(name, "int64", (1, 1)) for name in extras)
    token = TensorSignature("tokens", "int64", (1, 1), ("tokens",))
    chosen = TensorSignature(CHOSEN_TOKEN, "int64", (1, 1), ("sampler",))
    methods = {"decode": MethodSignature(("decode",), (token, start, *one), (chosen if chooses_tokens else logits,))}
    if has_prefill:
        content = tokens if prefill_content == "tokens" else embeds
        if prefill_content == "embeds":
            methods["token_embedding"] = MethodSignature(("token_embedding",), (tokens,), (embeds,))
        last = every if all_logits else logits
        methods["prefill"] = MethodSignature(("prefill",), (content, start, *many), (last,))
        if has_prefill_first:
            methods["prefill_first"] = MethodSignature(("prefill_first",), (content, *many), (last,))
    image = None
    if image_token_id is not None:
        pixels = TensorSignature("pixel_values", "float32", (1, 3, IMAGE_SIZE, IMAGE_SIZE), ("image",))
        features = TensorSignature("embeds", "float32", (IMAGE_TOKENS, WIDTH), ("prefill.embeds",))
        methods["vision_encoder"] = MethodSignature(("encoder(image)",), (pixels,), (features,))
        size = (IMAGE_SIZE, IMAGE_SIZE)
        image = ImageSettings("<image>", image_token_id, IMAGE_TOKENS, size, 2, None, 1 / 255, (0.5,) * 3, (0.5,) * 3)
    users = tuple(name for name in methods if name.startswith(("prefill", "decode")))
    row = StateRow(STATE_ROW, (1, max_context, 1, WIDTH), "float32", "BSHD", "zeros", FILE, users, users)
    return Manifest(
        programs=(ProgramFile(FILE, "fake", tuple(methods)),),
        methods=methods,
        state=(row,),
        max_context=max_context,
        vocab_size=vocab_size,
        bos_id=None,
        eos_ids=eos_ids,
        tokenizer=None,
        image=image,
        chat=ChatSettings(None),
        target="fake",
        recipe="fp32",
        pipeline="",
    )


class FakeRunner(MethodRunner):
    """Runs the methods of `fake_manifest`. `calls` lists method and input shapes of every call."""

    def __init__(self, manifest: Manifest | None = None) -> None:
        """Make the weights, the same each time; None takes `fake_manifest()`."""
        self.manifest = manifest if manifest is not None else fake_manifest()
        super().__init__(self.manifest, tuple(self.manifest.methods), self.manifest.state)
        generator = torch.Generator().manual_seed(0)
        self._embedding = torch.randn(self.manifest.vocab_size, WIDTH, generator=generator)
        self._head = torch.randn(WIDTH, self.manifest.vocab_size, generator=generator)
        self._vision = torch.randn(IMAGE_SIZE * IMAGE_SIZE * 3 // IMAGE_TOKENS, WIDTH, generator=generator)
        self._state = {row.name: torch.zeros(row.shape) for row in self.manifest.state}
        self.calls: list[tuple[str, dict[str, tuple[int, ...]]]] = []

    def count(self, method: str) -> int:
        """Return how often `method` ran."""
        return sum(name == method for name, _ in self.calls)

    @property
    def capabilities(self) -> Capabilities:
        """One engine named "fake"."""
        return Capabilities(("fake",))

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The state rows by name."""
        return self._state

    def bind_state(self, rows: Mapping[str, Tensor]) -> None:
        """Compute on the given tensors from now on."""
        self._state.update(rows)

    def _execute(self, method: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = {port.name: tensor for port, tensor in zip(self.signature(method).inputs, tensors, strict=True)}
        self.calls.append((method, {name: tuple(tensor.shape) for name, tensor in inputs.items()}))
        if method == "vision_encoder":
            return [inputs["pixel_values"].reshape(IMAGE_TOKENS, -1) @ self._vision]
        if method == "token_embedding":
            return [self._embedding[inputs["tokens"]]]
        embeds = inputs["embeds"] if "embeds" in inputs else self._embedding[inputs["tokens"]]
        start = int(inputs["start_pos"]) if "start_pos" in inputs else 0
        logits = self._attend(embeds, start)
        if self.signature(method).outputs[0].name == CHOSEN_TOKEN:
            return [logits[:, -1].argmax(-1, keepdim=True)]
        return [logits if len(self.signature(method).outputs[0].shape) == 3 else logits[:, -1]]

    def _attend(self, embeds: Tensor, start: int) -> Tensor:
        """Write [1, S, D] embeddings into the cache from slot `start`; return causal logits [1, S, V]."""
        stop = start + embeds.shape[1]
        cache = self._state[STATE_ROW][0, :, 0]
        if stop > cache.shape[0]:
            raise RunError(f"positions {start} to {stop} exceed the cache of {cache.shape[0]}")
        cache[start:stop] = embeds[0]
        weights = torch.cos(torch.arange(stop, dtype=torch.float32)).unsqueeze(1)
        hidden = torch.tanh((cache[:stop] * weights).cumsum(0)[start:] + embeds[0])
        return (hidden @ self._head).unsqueeze(0)
