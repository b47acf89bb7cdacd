"""A hand-written causal language model with hand-written entry points; no library's class is involved."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.compiler.model import CONTEXT, EagerOutputs, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.roles import DECODE, PREFILL, TOKEN_EMBEDDING
from triptych.compiler.stages import Captured, Source
from triptych.compiler.trace import CallTrace, Step
from triptych.manifest import DynamicDim, TensorSignature

VOCABULARY: Final = 48
WIDTH: Final = 32
HEADS: Final = 2
CONTEXT_LENGTH: Final = 24
SEQUENCE: Final = DynamicDim("S", 1, CONTEXT)
START_POS: Final = TensorSignature("start_pos", "int64", (1,), ("position",))
DEFAULT_PASSES: Final = "static-kv-cache,swap-sdpa"


class TinyAttention(nn.Module):
    """Causal self-attention as anyone would write it."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values [B, H, S, D]."""
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

    def merge(self, attended: Tensor) -> Tensor:
        """Project [B, H, S, D] back to [B, S, width]."""
        return self.out(attended.transpose(1, 2).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class TinyBlock(nn.Module):
    """Attention and a feed-forward layer, both residual."""

    def __init__(self, attention: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.attention = attention
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(x), approximate="tanh"))


class TinyModel(nn.Module):
    """Embedding, learned positions, blocks, and a projection tied to the embedding."""

    def __init__(self, *blocks: nn.Module, width: int = WIDTH, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(CONTEXT_LENGTH, width)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def logits(self, embeds: Tensor, positions: Tensor) -> Tensor:
        """[1, S, width] and [S] → [1, S, V]."""
        x = embeds + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.embedding(tokens), torch.arange(tokens.shape[1]))


def embed(module: Any, tokens: Tensor) -> Tensor:
    """The entry point `token_embedding`."""
    return module.embedding(tokens)


def prefill(module: Any, embeds: Tensor, start_pos: Tensor) -> Tensor:
    """The entry point `prefill`."""
    return module.logits(embeds, torch.arange(embeds.shape[1]) + start_pos)


def decode(module: Any, tokens: Tensor, start_pos: Tensor) -> Tensor:
    """The entry point `decode`."""
    return prefill(module, module.embedding(tokens), start_pos)


def eager(module: nn.Module, tokens: Tensor, _: tuple[Tensor, ...]) -> EagerOutputs:
    """The module's own forward over a whole sequence."""
    with torch.no_grad():
        return EagerOutputs(module(tokens.unsqueeze(0))[0], (), module.embedding(tokens))  # type: ignore[operator]


def entry_points(width: int = WIDTH) -> tuple[EntryPoint, ...]:
    """Token embedding, prefill and decode by the ABI."""
    tokens = TensorSignature("tokens", "int64", (1, SEQUENCE), ("tokens",))
    embeds = TensorSignature("embeds", "float32", (1, SEQUENCE, width), ("token_embedding.embeds",))
    token = TensorSignature("tokens", "int64", (1, 1), ("tokens",))
    logits = (OutputPort("logits", ("sampler",)),)
    return (
        EntryPoint(
            "token_embedding",
            frozenset({TOKEN_EMBEDDING}),
            embed,
            (tokens,),
            (OutputPort("embeds", ("prefill.embeds",)),),
        ),
        EntryPoint("prefill", frozenset({PREFILL}), prefill, (embeds, START_POS), logits),
        EntryPoint("decode", frozenset({DECODE}), decode, (token, START_POS), logits),
    )


def describe(module: nn.Module, *, width: int = WIDTH, tokenizer_file: Path | None = None) -> Model:
    """Describe a `TinyModel`."""
    return Model(
        module,
        entry_points(width),
        Metadata(
            max_context=CONTEXT_LENGTH,
            model_max_context=CONTEXT_LENGTH,
            vocab_size=VOCABULARY,
            eos_ids=(1,),
            components={
                "embedding": ("embedding",),
                "decoder": ("blocks", "norm"),
                "lm_head": ("head",),
            },
        ),
        eager=eager,
        tokenizer_file=tokenizer_file,
    )


def tiny(*attentions: nn.Module, layers: int = 2, tied: bool = True, width: int = WIDTH, seed: int = 0) -> Model:
    """Return a described model with random weights; `attentions` take the place of the ordinary ones."""
    torch.manual_seed(seed)
    chosen = attentions or tuple(TinyAttention(width) for _ in range(layers))
    module = TinyModel(*(TinyBlock(one, width) for one in chosen), width=width, tied=tied).eval()
    return describe(module, width=width)


def captured(model: Model | None = None, passes: str = DEFAULT_PASSES) -> Captured:
    """Run source passes over `model` (default: the tiny model) and capture it."""
    source = Source(tiny() if model is None else model)
    return (source.transform(passes) if passes else source).capture()


def with_entry_point(model: Model, name: str, **changes: Any) -> Model:
    """Return `model` with one entry point changed."""
    return replace(
        model,
        entry_points=tuple(replace(entry, **changes) if entry.name == name else entry for entry in model.entry_points),
    )


def trace(*steps: tuple[str, int], seed: int = 0, name: str = "trace") -> CallTrace:
    """Return a trace over random tokens with these steps, each (kind, count)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (sum(count for _, count in steps),), generator=generator)
    return CallTrace(name, tokens, tuple(Step(kind, count) for kind, count in steps))
