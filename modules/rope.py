"""Rotary position embeddings (Su et al., arXiv:2104.09864) as exportable functions and one module.

The first `rotary_dim` values of a head are rotated, the rest passes through. Dimension j turns with the inverse
frequency base^(-2j / rotary_dim); with its partner it spans a plane: j + rotary_dim / 2 in the layout of Hugging Face
checkpoints, its neighbour in the interleaved layout of the paper and of Meta's checkpoints. Tables have one column for
each plane.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearScaling:
    """All positions are divided by `factor` (position interpolation, Chen et al., arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Long wavelengths are stretched by `factor`, short ones stay, and between them lies a ramp (Llama 3.1).

    A wavelength is long above ``original_context / low_freq_factor`` positions, short below
    ``original_context / high_freq_factor``.
    """

    factor: float
    original_context: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class YarnScaling:
    """Interpolation by parts with scaled attention (YaRN, Peng et al., arXiv:2309.00071).

    Planes that turn more than `beta_fast` times within `original_context` stay, those that turn less than `beta_slow`
    times are stretched by `factor`; `truncate` rounds the two bounds outwards to whole planes. Sines and cosines are
    multiplied by `attention_factor`, by default 0.1 ln(factor) + 1; where `mscale` and `mscale_all_dim` are both
    given, by the ratio of that formula with each in front of the logarithm.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def inverse_frequencies(rotary_dim: int, base: float = 10_000.0, scaling: Scaling | None = None) -> Tensor:
    """Return radians for each position, float32 [rotary_dim / 2]; raises `ValueError` for an odd `rotary_dim`."""
    if rotary_dim % 2 or rotary_dim < 2:
        raise ValueError(f"rotary_dim is {rotary_dim}, expected an even number of at least 2: planes have two axes")
    plain = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim)
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        turns = scaling.original_context * plain / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    elif isinstance(scaling, YarnScaling):
        kept = 1 - _yarn_ramp(rotary_dim, base, scaling)
    else:
        return plain
    kept = kept.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn_ramp(rotary_dim: int, base: float, scaling: YarnScaling) -> Tensor:
    """Return 0 for planes that stay, 1 for planes that are stretched, [rotary_dim / 2]."""

    def plane(turns: float) -> float:
        """The plane, as a real number, that turns so many times within the original context."""
        return rotary_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = plane(scaling.beta_fast), plane(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    return (torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / ((last - first) or 0.001)


def attention_factor(scaling: Scaling | None) -> float:
    """Return what sines and cosines are multiplied by: 1 for everything but YaRN."""
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _yarn_magnitude(scaling.factor, scaling.mscale) / _yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    return _yarn_magnitude(scaling.factor, 1.0)


def _yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def rotary_tables(
    positions: int, rotary_dim: int, base: float = 10_000.0, scaling: Scaling | None = None
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for the positions 0 … `positions` - 1, float32 [positions, rotary_dim / 2] each."""
    angles = torch.arange(positions).float().unsqueeze(1) * inverse_frequencies(rotary_dim, base, scaling)
    factor = attention_factor(scaling)
    return angles.cos() * factor, angles.sin() * factor


def multimodal_axes(sections: Sequence[int], *, interleaved: bool = False) -> Tensor:
    """Return for each plane which row of the positions turns it, int64 [sum of sections] (M-RoPE, arXiv:2409.12191).

    `sections` counts the planes of time, height and width. They follow each other, or take turns with `interleaved`
    (time, height, width, time, …) until height and width have theirs, and time has the rest.
    """
    if not interleaved:
        return torch.repeat_interleave(torch.arange(len(sections)), torch.tensor(list(sections)))
    axes = torch.zeros(sum(sections), dtype=torch.int64)
    for row, count in enumerate(sections[1:], start=1):
        axes[row : count * len(sections) : len(sections)] = row
    return axes


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the planes of `x` [..., D] by `cos` and `sin` [..., R / 2], which broadcast against it; R may be below D.

    For `x` [B, H, S, D] tables are [S, R / 2]; for [B, S, H, D] they are [S, 1, R / 2].
    """
    planes = cos.shape[-1]
    turning, rest = x[..., : 2 * planes], x[..., 2 * planes :]
    if interleaved:
        pairs = turning.unflatten(-1, (planes, 2))
        first, second = pairs[..., 0], pairs[..., 1]
    else:
        first, second = turning[..., :planes], turning[..., planes:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return rotated if 2 * planes == x.shape[-1] else torch.cat((rotated, rest), dim=-1)


class RotaryEmbedding(nn.Module):
    """Rotates queries or keys by tables in buffers ``cos`` and ``sin`` [max_context, rotary_dim / 2].

    Args:
        max_context: the number of positions in the tables; a position beyond is an index error.
        rotary_dim: how many values of each head are rotated, from the first on.
        base: base of the frequencies ("rope_theta").
        scaling: how the frequencies are stretched for longer contexts.
        sections: for M-RoPE the planes of time, height and width; positions then have three rows.
        interleaved_sections: whether time, height and width take turns.
        interleaved: whether partners are neighbours.
        heads_first: True for values [B, H, S, D], False for [B, S, H, D].
    """

    cos: Tensor
    sin: Tensor
    axes: Tensor | None

    def __init__(
        self,
        max_context: int,
        rotary_dim: int,
        base: float = 10_000.0,
        scaling: Scaling | None = None,
        *,
        sections: Sequence[int] | None = None,
        interleaved_sections: bool = False,
        interleaved: bool = False,
        heads_first: bool = True,
    ) -> None:
        super().__init__()
        if sections is not None and sum(sections) != rotary_dim // 2:
            raise ValueError(
                f"sections {list(sections)} have {sum(sections)} planes, expected {rotary_dim // 2}: half of rotary_dim"
            )
        cos, sin = rotary_tables(max_context, rotary_dim, base, scaling)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        axes = None if sections is None else multimodal_axes(sections, interleaved=interleaved_sections)
        self.register_buffer("axes", axes, persistent=False)
        self.interleaved = interleaved
        self.heads_first = heads_first

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` at `positions`: int64 [S], or [3, S] with sections."""
        if self.axes is None:
            cos, sin = self.cos.index_select(0, positions), self.sin.index_select(0, positions)
        else:
            places = positions.index_select(0, self.axes).transpose(0, 1)
            cos, sin = self.cos.gather(0, places), self.sin.gather(0, places)
        if not self.heads_first:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype), interleaved=self.interleaved)
