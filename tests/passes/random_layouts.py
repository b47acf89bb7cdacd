"""Random chains of permutes, views, copies and arithmetic, as modules to rewrite and compare."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

SHAPE: Final = (2, 5, 3, 4)
DYNAMIC_AXIS: Final = 1

Op = Callable[[list[Tensor]], Tensor]
"""Takes the values so far and gives the next one; it looks at the last one first."""


@dataclass(frozen=True)
class Step:
    """One operation; its numbers are taken modulo what they choose from, so that every one is legal."""

    kind: str
    numbers: tuple[int, ...]

    def __call__(self, values: list[Tensor]) -> Tensor:
        one = values[-1]
        return KINDS[self.kind](values, one, *self.numbers)


def order_of(axes: int, number: int) -> list[int]:
    """Return one of the permutations of so many axes."""
    left, order = list(range(axes)), []
    while left:
        order.append(left.pop(number % len(left)))
        number //= len(left) + 1
    return order


def partner(values: list[Tensor], one: Tensor, a: int, b: int) -> Tensor:
    """Add a value of the same shape, whichever way the axes of `one` have to be turned for it."""
    alike = [other for other in values if other.shape == one.shape]
    return one + 2 * alike[a % len(alike)] if b % 3 else alike[a % len(alike)] * one.sigmoid()


def turned_partner(values: list[Tensor], one: Tensor, a: int, b: int) -> Tensor:
    """Multiply with an earlier value of as many elements on every axis, in another order."""
    order = order_of(one.dim(), a)
    alike = [other for other in values if other.permute(order).shape == one.shape]
    return one.cos() * alike[b % len(alike)].permute(order) if alike else one


def halves(_values: list[Tensor], one: Tensor, _a: int, b: int) -> Tensor:
    """Rotate halves of an axis of even size, as rotary embeddings do."""
    axis = next((i for i in range(one.dim()) if one.shape[i] == 4), None)
    if axis is None:
        return one
    first, second = one.chunk(2, dim=axis - one.dim() if b % 2 else axis)
    return torch.cat((-second, first), dim=axis)


def written(_values: list[Tensor], one: Tensor, a: int, b: int) -> Tensor:
    """Write in place into a view of a copy, and see it through the other one."""
    copy = one.clone()
    view = copy.permute(order_of(one.dim(), a))
    view.mul_(2)
    return copy + view.sum() if b % 2 else view.contiguous().permute(inverse_of(order_of(one.dim(), a)))


def inverse_of(order: Sequence[int]) -> list[int]:
    return [list(order).index(axis) for axis in range(len(order))]


def vector(_values: list[Tensor], one: Tensor, a: int, _b: int) -> Tensor:
    """Broadcast a value of fewer axes."""
    axis = a % one.dim()
    line = one.mean(dim=[other for other in range(one.dim()) if other != axis])
    for _ in range(one.dim() - 1 - axis):
        line = line.unsqueeze(-1)
    return one - line


def normalized(_values: list[Tensor], one: Tensor, _a: int, _b: int) -> Tensor:
    """Root mean square normalization over the last axis."""
    return one * torch.rsqrt(one.pow(2).mean(-1, keepdim=True) + 1e-3)


KINDS: Final[dict[str, Callable[..., Tensor]]] = {
    "permute": lambda values, one, a, b: one.permute(order_of(one.dim(), a)),
    "transpose": lambda values, one, a, b: one.transpose(a % one.dim(), -1 - b % one.dim()),
    "move": lambda values, one, a, b: one.movedim(a % one.dim(), b % one.dim()),
    "undo": lambda values, one, a, b: (
        one.permute(order_of(one.dim(), a)).tanh().permute(inverse_of(order_of(one.dim(), a)))
    ),
    "pointwise": lambda values, one, a, b: (one.tanh(), one * 0.5, -one, one.double().float())[a % 4],
    "partner": partner,
    "turned": turned_partner,
    "halves": halves,
    "vector": vector,
    "normalized": normalized,
    "written": written,
    "mean": lambda values, one, a, b: one - one.mean(a % one.dim(), keepdim=True),
    "max": lambda values, one, a, b: (
        one - one.amax((a % one.dim(), -1), keepdim=True) if a % one.dim() != one.dim() - 1 else one
    ),
    "softmax": lambda values, one, a, b: one.softmax(a % one.dim()),
    "sum": lambda values, one, a, b: one.cumsum(a % one.dim()),
    "flip": lambda values, one, a, b: one.flip(a % one.dim()),
    "clone": lambda values, one, a, b: one.clone(),
    "contiguous": lambda values, one, a, b: one.contiguous(),
    "views": lambda values, one, a, b: one.contiguous().view(-1).view(one.shape),
    "slices": lambda values, one, a, b: (
        torch.cat(
            (one.narrow(a % one.dim(), 1, 1) * 3, one.narrow(a % one.dim(), 0, 1).expand(one.shape)), a % one.dim()
        ).narrow(a % one.dim(), 0, 2)
        + one.narrow(a % one.dim(), 0, 1)
    ),
    "select": lambda values, one, a, b: one * one.select(a % one.dim(), 0).unsqueeze(a % one.dim()),
    "back": lambda values, one, a, b: values[a % len(values)],
}


def steps(longest: int = 9) -> st.SearchStrategy[list[Step]]:
    """Chains of steps, most often with permutes in them."""
    kind = st.one_of(st.sampled_from(["permute", "transpose", "undo"]), st.sampled_from(sorted(KINDS)))
    number = st.integers(0, 23)
    return st.lists(st.builds(Step, kind, st.tuples(number, number)), min_size=2, max_size=longest)


class Chain(nn.Module):
    """Carries the steps out and returns the last value, and another one."""

    def __init__(self, chain: Sequence[Step], also: int) -> None:
        super().__init__()
        self.chain = tuple(chain)
        self.also = also

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = [x]
        for step in self.chain:
            values.append(step(values))
        return values[-1], values[self.also % len(values)] + 0
