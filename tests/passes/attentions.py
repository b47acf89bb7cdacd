"""Attention modules that cache passes must leave alone, each for one reason; at the end those with masks they read."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler.tiny import WIDTH, TinyAttention


class Masked(TinyAttention):
    """The first two positions see each other; the rest is causal."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        mask[:, :2] = True
        return self.merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))


class NotCausal(TinyAttention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return self.merge(F.scaled_dot_product_attention(query, key, value))


class Dropping(TinyAttention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        return self.merge(F.scaled_dot_product_attention(query, key, value, dropout_p=0.25, is_causal=True))


class Twice(TinyAttention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        once = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.merge(once + F.scaled_dot_product_attention(query, value, key, is_causal=True))


class Batched(TinyAttention):
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.expand(2, -1, -1, -1) for part in self.split(x))
        return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=True))[:1]


class Cross(TinyAttention):
    """Attends to five learned positions."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.memory = nn.Parameter(torch.randn(1, 5, width))

    def forward(self, x: Tensor) -> Tensor:
        query, (_, key, value) = self.split(x)[0], self.split(self.memory)
        return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class Banded(TinyAttention):
    """Causal attention by an explicit mask: the last `window` positions, and the first `sink`."""

    def __init__(self, window: int, sink: int = 0, width: int = WIDTH) -> None:
        super().__init__(width)
        self.window, self.sink = window, sink

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        at = torch.arange(x.shape[1])
        near = at.unsqueeze(0) > at.unsqueeze(1) - self.window
        mask = (at.unsqueeze(0) <= at.unsqueeze(1)) & (near | (at.unsqueeze(0) < self.sink))
        return self.merge(F.scaled_dot_product_attention(query, key, value, attn_mask=mask))
