"""The neutral operators against loops in float64 that follow the words of their definition."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.modules.attention_by_hand import attend_by_hand, causal, sliding
from triptych.modules.operators import REFERENCE_KERNELS

MAXIMUM = 13
OPS = torch.ops.triptych
FEW = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def drawn(length: int, heads: int, width: int = 8) -> Tensor:
    return torch.randn(1, length, heads, width)


def at(position: int) -> Tensor:
    return torch.tensor([position])


# ------------------------------------------------------------------------------------------------ static caches


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 5), (0, MAXIMUM), (4, 1), (7, 3), (MAXIMUM - 1, 1), (MAXIMUM - 4, 4)]
)
@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_cached_sdpa_is_causal_attention_over_the_filled_slots(
    start: int, length: int, heads: int, groups: int, scale: float | None
) -> None:
    query, key, value = drawn(length, heads), drawn(MAXIMUM, groups), drawn(MAXIMUM, groups)
    got = OPS.cached_sdpa(query, key, value, at(start), scale)
    close(got, attend_by_hand(query, key, value, start, causal, scale=scale))


@FEW
@given(
    window=st.integers(1, MAXIMUM + 3),
    length=st.integers(1, MAXIMUM),
    softcap=st.sampled_from([None, 0.5, 20.0]),
    groups=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_windows_and_soft_caps(
    window: int, length: int, softcap: float | None, groups: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, MAXIMUM - length))
    query, key, value = 3 * drawn(length, 4), drawn(MAXIMUM, groups), drawn(MAXIMUM, groups)
    got = OPS.cached_sdpa(query, key, value, at(start), window=window, softcap=softcap)
    close(got, attend_by_hand(query, key, value, start, sliding(window), softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_mask_stands_in_place_of_causality(softcap: float | None) -> None:
    """Here queries see what comes after them, and not slot 2: as in a block of image positions."""
    query, key, value = drawn(4, 2), drawn(MAXIMUM, 2), drawn(MAXIMUM, 2)
    mask = torch.ones(4, MAXIMUM, dtype=torch.bool)
    mask[:, 2] = False
    got = OPS.cached_sdpa(query, key, value, at(3), attn_mask=mask, softcap=softcap)
    close(got, attend_by_hand(query, key, value, 3, lambda _, slot: slot != 2, softcap=softcap))


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_float_mask_is_added_to_the_scores(softcap: float | None) -> None:
    query, key, value, mask = drawn(4, 2), drawn(MAXIMUM, 2), drawn(MAXIMUM, 2), torch.randn(4, MAXIMUM)
    got = OPS.cached_sdpa(query, key, value, at(3), attn_mask=mask, softcap=softcap)
    wanted = attend_by_hand(
        query, key, value, 3, lambda *_: True, softcap=softcap, addend=lambda one, slot: float(mask[one - 3, slot])
    )
    close(got, wanted)


def test_a_mask_and_a_window_contradict() -> None:
    x = drawn(2, 1)
    with pytest.raises(ValueError, match="give it, or a window, not both"):
        OPS.cached_sdpa(x, x, x, at(0), attn_mask=torch.ones(2, 2), window=1)


def test_values_may_be_wider_than_keys() -> None:
    query, key, value = drawn(3, 2, 4), drawn(MAXIMUM, 2, 4), drawn(MAXIMUM, 2, 10)
    close(OPS.cached_sdpa(query, key, value, at(2)), attend_by_hand(query, key, value, 2, causal))


def test_slots_behind_the_position_are_not_seen() -> None:
    query, key, value = drawn(2, 2), drawn(MAXIMUM, 2), drawn(MAXIMUM, 2)
    before = OPS.cached_sdpa(query, key, value, at(3))
    key[:, 5:], value[:, 5:] = 1e3, 1e3
    torch.testing.assert_close(OPS.cached_sdpa(query, key, value, at(3)), before, rtol=0, atol=0)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, MAXIMUM), (5, 3), (MAXIMUM - 2, 2)])
def test_update_cache_writes_its_slots_and_no_other(start: int, length: int) -> None:
    cache = drawn(MAXIMUM, 2)
    wanted, value = cache.clone(), drawn(length, 2)
    for index in range(length):
        wanted[0, start + index] = value[0, index]
    assert OPS.update_cache(cache, value, at(start)) is None
    torch.testing.assert_close(cache, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("start", "length"), [(MAXIMUM, 1), (MAXIMUM - 2, 3), (0, MAXIMUM + 1)])
def test_update_cache_past_the_last_slot_is_an_error(start: int, length: int) -> None:
    cache = torch.zeros(1, MAXIMUM, 2, 4)
    with pytest.raises((IndexError, RuntimeError)):
        OPS.update_cache(cache, torch.ones(1, length, 2, 4), at(start))


# ------------------------------------------------------------------------------------------------ rings


def ring_by_hand(values: Tensor, end: int, window: int, sink: int, ring: Tensor) -> Tensor:
    """Position after position, written over `ring`."""
    ring = ring.clone()
    for position in range(end):
        slot = position if position < sink else sink + (position - sink) % window
        ring[0, slot] = values[0, position]
    return ring


def pieces_of(lengths: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


CHUNKS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@FEW
@given(lengths=CHUNKS, window=st.integers(1, 8), sink=st.integers(0, 4))
def test_a_ring_holds_the_first_and_the_last_positions(lengths: list[int], window: int, sink: int) -> None:
    values = drawn(sum(lengths), 2, 3)
    ring = initial = drawn(sink + window, 2, 3)
    ring = ring.clone()
    for start, end in pieces_of(lengths):
        OPS.update_ring_cache(ring, values[:, start:end], at(start), sink)
        torch.testing.assert_close(ring, ring_by_hand(values, end, window, sink, initial), rtol=0, atol=0)


@FEW
@given(
    lengths=CHUNKS,
    window=st.integers(1, 8),
    sink=st.integers(0, 4),
    groups=st.sampled_from([1, 2, 4]),
    softcap=st.sampled_from([None, 1.0]),
)
def test_a_ring_of_the_window_is_enough_for_pieces_of_any_length(
    lengths: list[int], window: int, sink: int, groups: int, softcap: float | None
) -> None:
    """Also for pieces longer than the ring, and across its end; the ring begins with something else in it."""
    total = sum(lengths)
    query, key, value = 2 * drawn(total, 4), drawn(total, groups), drawn(total, groups)
    keys, values = drawn(sink + window, groups), drawn(sink + window, groups)
    for start, end in pieces_of(lengths):
        fresh = slice(start, end)
        got = OPS.ring_sdpa(
            query[:, fresh], key[:, fresh], value[:, fresh], keys, values, at(start), sink, softcap=softcap
        )
        wanted = attend_by_hand(query[:, fresh], key, value, start, sliding(window, sink), softcap=softcap)
        close(got, wanted)
        OPS.update_ring_cache(keys, key[:, fresh], at(start), sink)
        OPS.update_ring_cache(values, value[:, fresh], at(start), sink)


def test_a_ring_deep_in_a_conversation() -> None:
    """Positions of a thousand, window 5 and sink 2: prefilled in one piece, then one by one."""
    window, sink, total = 5, 2, 1003
    query, key, value = drawn(total, 2), drawn(total, 1), drawn(total, 1)
    keys, values = torch.zeros(1, 7, 1, 8), torch.zeros(1, 7, 1, 8)
    OPS.update_ring_cache(keys, key[:, :1000], at(0), sink)
    OPS.update_ring_cache(values, value[:, :1000], at(0), sink)
    for start in range(1000, total):
        fresh = slice(start, start + 1)
        got = OPS.ring_sdpa(query[:, fresh], key[:, fresh], value[:, fresh], keys, values, at(start), sink, 0.4)
        close(got, attend_by_hand(query[:, fresh], key, value, start, sliding(window, sink), scale=0.4))
        OPS.update_ring_cache(keys, key[:, fresh], at(start), sink)
        OPS.update_ring_cache(values, value[:, fresh], at(start), sink)


# ------------------------------------------------------------------------------------------------ int8


def rounded(row: Tensor) -> Tensor:
    """Each row of the last axis on its grid of 127 steps either way, element by element."""
    out = row.double().clone()
    for index in itertools.product(*map(range, row.shape[:-1])):
        step = float(row[index].abs().max()) / 127
        out[index] = torch.tensor([round(float(one) / step) * step if step else 0.0 for one in row[index]])
    return out


@pytest.mark.parametrize(("start", "length", "window"), [(0, 6, None), (4, 1, None), (9, 4, 3)])
def test_int8_rows_are_seen_as_rounded(start: int, length: int, window: int | None) -> None:
    total = start + length
    query, key, value = drawn(length, 4), drawn(total, 2), 5 * drawn(total, 2)
    rows = [torch.full((1, MAXIMUM, 2, width), 3, dtype=torch.int8) for width in (8, 8)]
    scales = [torch.ones(1, MAXIMUM, 2, 1) for _ in range(2)]
    for row, scale, one in zip(rows, scales, (key, value), strict=True):
        OPS.update_quantized_cache(row, scale, one[:, :start], at(0)) if start else None
        OPS.update_quantized_cache(row, scale, one[:, start:], at(start))
    got = OPS.quantized_cached_sdpa(query, rows[0], scales[0], rows[1], scales[1], at(start), window=window)
    sees = causal if window is None else sliding(window)
    close(got, attend_by_hand(query, rounded(key), rounded(value), start, sees))


def test_int8_rows_keep_their_slots_and_zeros() -> None:
    row, scales = torch.zeros(1, 4, 1, 3, dtype=torch.int8), torch.zeros(1, 4, 1, 1)
    value = torch.tensor([[[[-2.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]]])
    OPS.update_quantized_cache(row, scales, value, at(1))
    assert row[0, :, 0].tolist() == [[0, 0, 0], [-127, 64, 0], [0, 0, 0], [0, 0, 0]]
    torch.testing.assert_close(scales[0, :2, 0, 0], torch.tensor([0.0, 2 / 127]))


# ------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_int8_table_is_looked_up_and_scaled(groups: int) -> None:
    weight, scales = torch.randint(-128, 128, (7, 8), dtype=torch.int8), torch.rand(7, groups)
    indices = torch.tensor([[6, 0, 3, 3]])
    got = OPS.quantized_embedding(weight, scales, indices)
    assert got.shape == (1, 4, 8)
    for place, index in enumerate(indices[0].tolist()):
        for element in range(8):
            wanted = int(weight[index, element]) * float(scales[index, element // (8 // groups)])
            assert float(got[0, place, element]) == pytest.approx(wanted)


def test_two_values_a_byte_the_earlier_in_the_upper_half() -> None:
    """0x1F holds 1 - 8 and 15 - 8."""
    weight, scales = torch.tensor([[0x1F, 0x80], [0x00, 0xFF]], dtype=torch.uint8), torch.tensor([[2.0], [0.5]])
    got = OPS.quantized_embedding(weight, scales, torch.tensor([0, 1]))
    assert got.tolist() == [[-14.0, 14.0, 0.0, -16.0], [-4.0, -4.0, 3.5, 3.5]]


# ------------------------------------------------------------------------------------------------ registration

EXAMPLES = {
    "update_cache": lambda: (drawn(6, 2), drawn(2, 2), at(1)),
    "cached_sdpa": lambda: (drawn(2, 4), drawn(6, 2), drawn(6, 2), at(1)),
    "update_ring_cache": lambda: (drawn(6, 2), drawn(3, 2), at(9), 2),
    "ring_sdpa": lambda: (drawn(3, 4), drawn(3, 2), drawn(3, 2), drawn(6, 2), drawn(6, 2), at(9), 2),
    "update_quantized_cache": lambda: (
        torch.zeros(1, 6, 2, 8, dtype=torch.int8),
        torch.zeros(1, 6, 2, 1),
        drawn(2, 2),
        at(1),
    ),
    "quantized_cached_sdpa": lambda: (
        drawn(2, 4),
        torch.ones(1, 6, 2, 8, dtype=torch.int8),
        torch.rand(1, 6, 2, 1),
        torch.ones(1, 6, 2, 8, dtype=torch.int8),
        torch.rand(1, 6, 2, 1),
        at(1),
    ),
    "quantized_embedding": lambda: (torch.ones(5, 4, dtype=torch.int8), torch.rand(5, 2), torch.tensor([3, 0])),
}


def test_every_operator_is_tried_below() -> None:
    assert {f"triptych.{name}.default" for name in EXAMPLES} == {str(operator) for operator in REFERENCE_KERNELS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_schema_and_fake_kernel_agree_with_what_the_operator_does(name: str) -> None:
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(OPS, name).default, EXAMPLES[name](), test_utils=checks)
