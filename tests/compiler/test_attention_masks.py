"""A mask is read by its values: causal, causal within a window, or a phrase that says what it is instead."""

import re

import pytest
import torch
from torch import Tensor

from triptych.compiler.attention_masks import CausalBand, read_mask

LENGTH = 12


def band(window: int, length: int = LENGTH) -> Tensor:
    """Spelled out position by position, as the definition has it."""
    return torch.tensor([[0 <= query - key < window for key in range(length)] for query in range(length)])


def additive(mask: Tensor, excluded: float = float("-inf")) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, excluded)


@pytest.mark.parametrize("window", [1, 2, 5, LENGTH - 1])
def test_a_banded_causal_mask_is_its_window(window: int) -> None:
    assert read_mask(band(window)) == CausalBand(window)


@pytest.mark.parametrize("window", [LENGTH, LENGTH + 1, 10_000])
def test_a_window_no_shorter_than_the_mask_is_causal(window: int) -> None:
    assert read_mask(band(window)) == CausalBand(None)


@pytest.mark.parametrize("excluded", [float("-inf"), torch.finfo(torch.float32).min, -1e9, -1e4])
def test_an_additive_mask_counts_like_a_boolean_one(excluded: float) -> None:
    assert read_mask(additive(band(3), excluded)) == CausalBand(3)
    assert read_mask(additive(band(LENGTH), excluded)) == CausalBand(None)


def test_half_precision_masks_are_read() -> None:
    mask = additive(band(4)).to(torch.float16)
    assert read_mask(mask.clamp(min=torch.finfo(torch.float16).min)) == CausalBand(4)


def test_leading_dimensions_that_agree_do_not_matter() -> None:
    assert read_mask(band(3).expand(2, 4, -1, -1)) == CausalBand(3)


def test_a_single_position_is_causal() -> None:
    assert read_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool)) == CausalBand(None)


def changed(mask: Tensor, query: int, key: int) -> Tensor:
    mask = mask.clone()
    mask[query, key] = ~mask[query, key]
    return mask


def chunked(size: int) -> Tensor:
    chunk = torch.arange(LENGTH) // size
    return band(LENGTH) & (chunk.unsqueeze(1) == chunk)


REASONS = {
    "bidirectional": (torch.ones(LENGTH, LENGTH, dtype=torch.bool), "lets query 0 attend to the later key 1"),
    "one later key": (changed(band(LENGTH), 5, 9), "lets query 5 attend to the later key 9"),
    "a hole": (changed(band(LENGTH), 7, 3), r"lets query 7 attend to 7 keys between 0 and 7, and query 11 to keys 0"),
    "one key too many": (changed(band(4), 8, 4), r"lets query 8 attend to keys 4 to 8, and query 11 to keys 8 to 11"),
    "chunks": (chunked(4), r"lets query 4 attend to key 4, and query 11 to keys 8 to 11"),
    "padding": (band(LENGTH) & (torch.arange(LENGTH) > 1), "lets query 0 attend to no key"),
    "nothing": (torch.zeros(LENGTH, LENGTH, dtype=torch.bool), "lets query 11 attend to no key"),
    "a bias": (additive(band(LENGTH)) - 0.5 * band(LENGTH), r"adds a bias to the scores \(-0.5 to -0.5\)"),
    "a soft exclusion": (additive(band(LENGTH), -100.0), r"adds a bias to the scores \(-100 to -100\)"),
    "not a number": (additive(band(LENGTH), float("nan")), "adds a bias to the scores"),
    "heads that differ": (torch.stack([band(3), band(4)]).unsqueeze(0), "differs between heads or batch rows"),
    "another length": (torch.ones(3, 5, dtype=torch.bool), "covers 5 keys for 3 queries"),
}


@pytest.mark.parametrize(("mask", "reason"), REASONS.values(), ids=REASONS.keys())
def test_any_other_mask_is_described(mask: Tensor, reason: str) -> None:
    found = read_mask(mask)
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_a_band_within_a_shorter_sequence() -> None:
    assert CausalBand(8).within(9) == CausalBand(8)
    assert CausalBand(8).within(8) == CausalBand(None)
    assert CausalBand(None).within(3) == CausalBand(None)
