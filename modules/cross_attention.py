"""Cross-attention that keeps the keys and values of its encoder input, so that later calls need not bring it again.

What a call knows of the encoder input is announced once, around it, and read by every cross-attention below, as the
position is (see `position`). The projections of keys and values stay outside of the branch between new and kept ones:
a back end that looks into no branch still gets every linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CROSS_ATTENTION_NAME: Final = "cross_attention"
"""The name under which a `CrossAttention` is a child of the module whose attention call it takes over."""

ENCODER_INPUT_NAME: Final = "encoder_input_state"
"""The name under which the one `EncoderInputState` of a model is a child of its root."""

Presence = bool | Tensor
"""Whether a call brings an encoder input: known beforehand, or a boolean tensor with one element."""

_announced: ContextVar[tuple[Presence, bool] | None] = ContextVar("encoder_input", default=None)


@contextmanager
def encoder_input(present: Presence, *, attends: bool = True) -> Iterator[None]:
    """Announce to the modules called inside whether this call brings an encoder input.

    Where nothing `attends` to it, only its keys and values are kept, and attention gives zeros.
    """
    token = _announced.set((present, attends))
    try:
        yield
    finally:
        _announced.reset(token)


def current_presence() -> Presence:
    """Return what was announced; raises `RuntimeError` outside of `encoder_input`."""
    announced = _announced.get()
    if announced is None:
        raise RuntimeError(
            "a cross-attention cache was called outside of 'encoder_input'; announce whether the call brings an "
            "encoder input"
        )
    return announced[0]


def _attends() -> bool:
    announced = _announced.get()
    return announced is None or announced[1]


class EncoderInputState(nn.Module):
    """Whether any encoder input was seen so far: the buffer ``seen``, bool [1], false at first."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1, dtype=torch.bool))

    def forward(self, present: Presence) -> Tensor:
        """Record a call that brings an encoder input or brings none; return whether any call so far did, bool [1]."""
        if isinstance(present, Tensor):
            self.seen.logical_or_(present.reshape(1))
        elif present:
            self.seen.fill_(value=True)
        return self.seen


class CrossAttentionCache(nn.Module):
    """Keys and values of one encoder input.

    Buffers ``keys`` and ``values`` are [1, T, heads, head_dim] for T positions of the encoder and start as zeros.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, length: int, heads: int, head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, length, heads, head_dim, dtype=dtype))
        self.register_buffer("values", torch.zeros(1, length, heads, value_dim, dtype=dtype))

    def forward(self, keys: Tensor, values: Tensor, present: Presence) -> tuple[Tensor, Tensor]:
        """Return the rows to attend to, and keep them: `keys` and `values` where `present`, else those kept.

        `keys` and `values` have the shape of the buffers. Where `present` is False they may hold anything, NaN
        included. A tensor decides when it runs, by ``torch.cond``, and then the rows are written in either case.
        """
        if isinstance(present, Tensor):
            kept = (self.keys, self.values)
            keys, values = torch.cond(present.reshape(()), _take_new, _take_kept, (keys, values, *kept))
        elif not present:
            return self.keys, self.values
        self.keys.copy_(keys)
        self.values.copy_(values)
        return keys, values


def _take_new(keys: Tensor, values: Tensor, _kept_keys: Tensor, _kept_values: Tensor) -> tuple[Tensor, Tensor]:
    # A branch may not return an operand itself, and both must lay their results out alike.
    return keys.clone(memory_format=torch.contiguous_format), values.clone(memory_format=torch.contiguous_format)


def _take_kept(_keys: Tensor, _values: Tensor, kept_keys: Tensor, kept_values: Tensor) -> tuple[Tensor, Tensor]:
    return kept_keys.clone(), kept_values.clone()


class CrossAttention(nn.Module):
    """Attention to the encoder input of this call, or of the last one that brought any.

    It is called like ``scaled_dot_product_attention``, inside of `encoder_input` or with `present` given.
    """

    def __init__(self, cache: CrossAttentionCache) -> None:
        super().__init__()
        self.cache = cache

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        *,
        present: Presence | None = None,
    ) -> Tensor:
        """`query` [1, H, S, D]; `key` and `value` [1, H_kv, T, D]; `attn_mask` broadcasts to [1, H, S, T].

        `present` says whether `key` and `value` are of a new encoder input; where it is None, what was announced does.
        Strict export needs it given. Returns [1, H, S, D]. Raises `ValueError` for a causal call or for dropout.
        """
        if is_causal or dropout_p != 0.0:
            raise ValueError("cached cross-attention replaces calls that are not causal and have no dropout")
        announced = (current_presence(), _attends()) if present is None else (present, True)
        keys, values = self.cache(key.transpose(1, 2), value.transpose(1, 2), announced[0])
        if not announced[1]:
            return query.new_zeros(*query.shape[:-1], value.shape[-1])
        return F.scaled_dot_product_attention(
            query, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=attn_mask, scale=scale, enable_gqa=enable_gqa
        )
