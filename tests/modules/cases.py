"""Modules around the neutral operators and the caches, with calls to play on every engine."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from triptych.modules.attention import CachedAttention, OperatorKernels
from triptych.modules.kv_cache import KVCache, QuantizedKVCache, QuantizedRingKVCache, RingKVCache, StaticKVCache

HEADS, GROUPS, WIDTH, SLOTS = 4, 2, 8, 32
PIECES = (3, 7, 1, 4, 12)
"""A conversation whose pieces are shorter and longer than the windows below."""


class Cached(nn.Module):
    """Attention through a cache, by neutral operators."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.routed_attention = CachedAttention(cache)
        self.routed_attention.kernel = OperatorKernels()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, start_pos: Tensor) -> Tensor:
        attended: Tensor = self.routed_attention(query, key, value)
        return attended


class Masked(nn.Module):
    """``cached_sdpa`` by a mask of its own, and beside it with a soft cap and values of another width than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, SLOTS, GROUPS, WIDTH))
        self.register_buffer("wide", torch.zeros(1, SLOTS, GROUPS, 2 * WIDTH))

    def forward(
        self, query: Tensor, key: Tensor, mask: Tensor, bool_mask: Tensor, start_pos: Tensor
    ) -> tuple[Tensor, ...]:
        operators = torch.ops.triptych
        operators.update_cache(self.keys, key, start_pos)
        operators.update_cache(self.wide, torch.cat([key, -key], dim=-1), start_pos)
        return (
            operators.cached_sdpa(query, self.keys, self.keys, start_pos, attn_mask=mask),
            operators.cached_sdpa(query, self.keys, self.keys, start_pos, 0.5, attn_mask=bool_mask),
            operators.cached_sdpa(query, self.keys, self.keys, start_pos, window=6, softcap=1.5),
            operators.cached_sdpa(query, self.keys, self.wide, start_pos),
        )


class Table(nn.Module):
    """Lookups in an int8 and in a 4-bit table."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("bytes", torch.randint(-127, 128, (9, 64), generator=generator).to(torch.int8))
        self.register_buffer("halves", torch.randint(0, 256, (9, 32), generator=generator).to(torch.uint8))
        self.register_buffer("scales", torch.rand(9, 2, generator=generator))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        lookup = torch.ops.triptych.quantized_embedding
        return lookup(self.bytes, self.scales, tokens), lookup(self.halves, self.scales, tokens)


Case = tuple[nn.Module, list[tuple[Tensor, ...]]]


def static(window: int | None = None) -> KVCache:
    return StaticKVCache(SLOTS, GROUPS, WIDTH, WIDTH, torch.float32, window=window)


def ring(window: int = 5, sink: int = 0) -> KVCache:
    return RingKVCache(window, GROUPS, WIDTH, WIDTH, torch.float32, sink=sink)


def int8(window: int | None = None) -> KVCache:
    return QuantizedKVCache(SLOTS, GROUPS, WIDTH, WIDTH, window=window)


def int8_ring(window: int = 5, sink: int = 0) -> KVCache:
    return QuantizedRingKVCache(window, GROUPS, WIDTH, WIDTH, sink=sink)


CACHES = {
    "static": static(),
    "static, window": static(6),
    "ring": ring(),
    "ring, sink": ring(sink=2),
    "int8": int8(),
    "int8, window": int8(6),
    "int8 ring, sink": int8_ring(sink=3),
}


def fresh(length: int, heads: int) -> Tensor:
    return torch.randn(1, heads, length, WIDTH)


def cached(cache: KVCache, pieces: Sequence[int] = PIECES) -> Case:
    starts = accumulate(pieces[:-1], initial=0)
    return Cached(cache), [
        (fresh(one, HEADS), fresh(one, GROUPS), fresh(one, GROUPS), torch.tensor([start]))
        for one, start in zip(pieces, starts, strict=True)
    ]


def masked(pieces: Sequence[int] = PIECES) -> Case:
    calls = []
    for start, end in pairwise(accumulate(pieces, initial=0)):
        length = end - start
        query, key = (torch.randn(1, length, heads, WIDTH) for heads in (HEADS, GROUPS))
        bools = torch.rand(length, SLOTS) < 0.7
        bools[:, 0] = True
        calls.append((query, key, torch.randn(length, SLOTS), bools, torch.tensor([start])))
    return Masked(), calls


def table(pieces: Sequence[int] = PIECES) -> Case:
    return Table(), [(torch.randint(0, 9, (1, one)),) for one in pieces]
