"""The neutral operators against loops in float64 that follow the words of their definition."""

import math

import pytest
import torch
from torch import Tensor

import triptych.modules.operators  # noqa: F401 (registers the operators)

MAXIMUM = 13


def attend_by_hand(query: Tensor, key: Tensor, value: Tensor, start: int, scale: float | None) -> Tensor:
    """Query i of each head attends to slots 0 … start + i of its group's keys; everything in float64."""
    query, key, value = query.double(), key.double(), value.double()
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    factor = 1 / math.sqrt(width) if scale is None else scale
    out = torch.zeros(batch, length, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for i in range(length):
            for h in range(heads):
                slots = range(start + i + 1)
                scores = [float(query[b, i, h] @ key[b, slot, h // group]) * factor for slot in slots]
                largest = max(scores)
                weights = [math.exp(score - largest) for score in scores]
                for slot, weight in zip(slots, weights, strict=True):
                    out[b, i, h] += weight / sum(weights) * value[b, slot, h // group]
    return out


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 5), (0, MAXIMUM), (4, 1), (7, 3), (MAXIMUM - 1, 1), (MAXIMUM - 4, 4)]
)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_cached_sdpa_is_causal_attention_over_the_filled_slots(
    start: int, length: int, heads: int, groups: int, scale: float | None
) -> None:
    query = torch.randn(1, length, heads, 8)
    key, value = torch.randn(1, MAXIMUM, groups, 8), torch.randn(1, MAXIMUM, groups, 8)
    got = torch.ops.triptych.cached_sdpa(query, key, value, torch.tensor([start]), scale)
    wanted = attend_by_hand(query, key, value, start, scale)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_values_may_be_wider_than_keys() -> None:
    query, key, value = torch.randn(1, 3, 2, 4), torch.randn(1, MAXIMUM, 2, 4), torch.randn(1, MAXIMUM, 2, 10)
    got = torch.ops.triptych.cached_sdpa(query, key, value, torch.tensor([2]))
    torch.testing.assert_close(got.double(), attend_by_hand(query, key, value, 2, None), rtol=1e-5, atol=1e-5)


def test_slots_behind_the_position_are_not_seen() -> None:
    query, key, value = torch.randn(1, 2, 2, 4), torch.randn(1, MAXIMUM, 2, 4), torch.randn(1, MAXIMUM, 2, 4)
    start = torch.tensor([3])
    before = torch.ops.triptych.cached_sdpa(query, key, value, start)
    key[:, 5:], value[:, 5:] = 1e3, 1e3
    torch.testing.assert_close(torch.ops.triptych.cached_sdpa(query, key, value, start), before, rtol=0, atol=0)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, MAXIMUM), (5, 3), (MAXIMUM - 2, 2)])
def test_update_cache_writes_its_slots_and_no_other(start: int, length: int) -> None:
    cache = torch.randn(1, MAXIMUM, 2, 4)
    wanted, value = cache.clone(), torch.randn(1, length, 2, 4)
    for index in range(length):
        wanted[0, start + index] = value[0, index]
    assert torch.ops.triptych.update_cache(cache, value, torch.tensor([start])) is None
    torch.testing.assert_close(cache, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("start", "length"), [(MAXIMUM, 1), (MAXIMUM - 2, 3), (0, MAXIMUM + 1)])
def test_update_cache_past_the_last_slot_is_an_error(start: int, length: int) -> None:
    cache = torch.zeros(1, MAXIMUM, 2, 4)
    with pytest.raises((IndexError, RuntimeError)):
        torch.ops.triptych.update_cache(cache, torch.ones(1, length, 2, 4), torch.tensor([start]))
