"""A small model that sees through cross-attention, and such modules that `cond-attention` must leave alone."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from tests.compiler.tiny import CONTEXT_LENGTH, START_POS, VOCABULARY, WIDTH
from triptych.compiler.model import EagerOutputs, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.roles import DECODE, PREFILL, encoder
from triptych.manifest import ImageSettings, TensorSignature

PATCHES = 4
PLACEHOLDER = VOCABULARY - 1
IMAGE = ImageSettings(
    token="<image>",
    token_id=PLACEHOLDER,
    tokens=0,
    resize=(8, 8),
    resample=2,
    crop=None,
    rescale=1 / 255,
    mean=None,
    std=None,
    suffix=(PLACEHOLDER,),
)


class Cross(tiny.TinyAttention):
    """Attention from a sequence to an encoder's output."""

    def rows(self, x: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.split(x)[0], *self.split(states)[1:]

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.rows(x, states)))


class Causal(Cross):
    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.rows(x, states), is_causal=True))


class Dropping(Cross):
    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.rows(x, states), dropout_p=0.25))


class Twice(Cross):
    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        query, key, value = self.rows(x, states)
        return self.merge(
            F.scaled_dot_product_attention(query, key, value) + F.scaled_dot_product_attention(query, value, key)
        )


class Joint(Cross):
    """Attends to itself and the encoder in one call: its keys follow both."""

    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        query, key, value = self.split(torch.cat([x, states], dim=1))
        return self.merge(F.scaled_dot_product_attention(query[:, :, : x.shape[1]], key, value))


class Batched(Cross):
    def forward(self, x: Tensor, states: Tensor) -> Tensor:
        rows = [one.expand(2, -1, -1, -1) for one in self.rows(x, states)]
        return self.merge(F.scaled_dot_product_attention(*rows))[:1]


class Renormalized(Cross):
    """Is called with a copy of the encoder's output, by `Seeing`."""


class Seeing(nn.Module):
    """A tiny decoder whose blocks are each followed by gated cross-attention to the patches of an image."""

    def __init__(self, *cross: nn.Module, leaks: bool = False) -> None:
        super().__init__()
        self.decoder = tiny.TinyModel(*(tiny.TinyBlock(tiny.TinyAttention()) for _ in cross))
        self.cross = nn.ModuleList(cross)
        self.vision = nn.Linear(3 * 4 * 4, WIDTH)
        self.leaks = leaks

    def encode(self, pixel_values: Tensor) -> Tensor:
        """[1, 3, 8, 8] → [1, 4, width]."""
        patches = pixel_values.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
        return self.vision(patches)

    def logits(self, tokens: Tensor, start_pos: Tensor, states: Tensor, present: Tensor) -> Tensor:
        """A token sees the image where `present` ([1], or one value a token) says so."""
        x = self.decoder.embedding(tokens) + self.decoder.positions(torch.arange(tokens.shape[1]) + start_pos)
        shown = present.reshape(1, -1, 1)
        if self.leaks:
            x = x + torch.where(shown, states.mean(1, keepdim=True), 0)
        for block, cross in zip(self.decoder.blocks, self.cross, strict=True):
            x = block(x)
            given = F.layer_norm(states, (WIDTH,)) if isinstance(cross, Renormalized) else states
            x = x + torch.where(shown, cross(x, given), 0)
        return self.decoder.head(self.decoder.norm(x))


def _logits(module: Any, *inputs: Tensor) -> Tensor:
    return module.logits(*inputs)


def _eager(module: Any, tokens: Tensor, pixel_values: tuple[Tensor, ...]) -> EagerOutputs:
    """Each token sees the last image at or before it; a trace with several is cut where they come."""
    with torch.no_grad():
        present = torch.eq(tokens, PLACEHOLDER).cumsum(0) > 0
        states = module.encode(pixel_values[0]) if pixel_values else torch.zeros(1, PATCHES, WIDTH)
        logits = module.logits(tokens.unsqueeze(0), torch.zeros(1, dtype=torch.int64), states, present)[0]
        return EagerOutputs(logits, (), module.decoder.embedding(tokens))


def entry_points(states: TensorSignature | None = None, *, from_encoder: bool = True) -> tuple[EntryPoint, ...]:
    """Prefill and decode with the encoder's output as an input, given by the entry point `vision_encoder` or not."""
    links = ("vision_encoder.encoder_states",) if from_encoder else ("image",)
    states = states or TensorSignature("encoder_states", "float32", (1, PATCHES, WIDTH), links)
    present = TensorSignature("encoder_present", "bool", (1,), ("image",))
    logits = (OutputPort("logits", ("sampler",)),)
    text = tuple(
        EntryPoint(
            name,
            frozenset({role}),
            _logits,
            (TensorSignature("tokens", "int64", (1, length), ("tokens",)), START_POS, states, present),
            logits,
        )
        for name, role, length in (("prefill", PREFILL, tiny.SEQUENCE), ("decode", DECODE, 1))
    )
    if not from_encoder:
        return text
    pixels = TensorSignature("pixel_values", "float32", (1, 3, 8, 8), ("image",))
    outputs = (OutputPort("encoder_states", ("prefill.encoder_states", "decode.encoder_states")),)
    encode = EntryPoint(
        "vision_encoder",
        frozenset({encoder("image")}),
        lambda module, pixels: module.encode(pixels),
        (pixels,),
        outputs,
    )
    return (encode, *text)


def seeing(*cross: nn.Module, leaks: bool = False, from_encoder: bool = True, **options: Any) -> Model:
    """Return a described model with random weights; it has one layer for each of `cross`, or two."""
    torch.manual_seed(3)
    module = Seeing(*(cross or (Cross(), Cross())), leaks=leaks).eval()
    return Model(
        module,
        entry_points(from_encoder=from_encoder, **options),
        Metadata(
            max_context=CONTEXT_LENGTH,
            model_max_context=CONTEXT_LENGTH,
            vocab_size=VOCABULARY,
            image=IMAGE if from_encoder else None,
            components={"embedding": ("decoder.embedding",), "vision": ("vision",)},
        ),
        eager=_eager,
    )
