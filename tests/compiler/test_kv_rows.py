"""Reading rows of every kind of cache back, by their names and shapes alone."""

import pytest
import torch
from torch import Tensor

from triptych.compiler.kv_rows import is_kv_row, read_rows, wanted_row

KEYS = "blocks.0.attention.routed_attention.cache.keys"


def positions(*numbers: int) -> Tensor:
    """A row whose slots hold the numbers of positions."""
    return torch.tensor(numbers, dtype=torch.float32).reshape(1, -1, 1, 1)


def numbers(row: Tensor | None) -> list[float]:
    assert row is not None
    return row.flatten().tolist()


@pytest.mark.parametrize(
    ("name", "slots", "position", "kept"),
    [
        (KEYS, (0, 1, 2, 9, 9), 3, [0, 1, 2]),
        (KEYS, (0, 1, 2, 3, 4), 5, [0, 1, 2, 3, 4]),
        (KEYS, (5, 6, 2, 3, 4), 7, [2, 3, 4, 5, 6]),
        (f"{KEYS}_sink2", (0, 1, 2, 9, 9), 3, [0, 1, 2]),
        (f"{KEYS}_sink2", (0, 1, 8, 6, 7), 9, [0, 1, 6, 7, 8]),
    ],
    ids=["static", "full", "ring", "sink", "sink and ring"],
)
def test_rows_are_read_in_the_order_of_positions(
    name: str, slots: tuple[int, ...], position: int, kept: list[float]
) -> None:
    read = read_rows({name: positions(*slots)}, position)
    assert numbers(read[name]) == kept
    whole = {KEYS: positions(*range(position))}
    assert numbers(wanted_row(whole, name, read[name])) == kept


def test_int8_rows_are_read_with_their_scales() -> None:
    rows = {KEYS: torch.tensor([2, -4, 6], dtype=torch.int8).reshape(1, 3, 1, 1), f"{KEYS}_scales": positions(1, 10, 5)}
    read = read_rows(rows, 2)
    assert list(read) == [KEYS]
    assert numbers(read[KEYS]) == [2, -40]


def test_other_rows_are_read_whole_and_copied() -> None:
    row = torch.arange(4.0)
    read = read_rows({"seen": row, "seen_scales": row}, 2)
    assert list(read) == ["seen", "seen_scales"]
    row.zero_()
    assert numbers(read["seen"]) == [0, 1, 2, 3]
    assert wanted_row({"seen": row}, "seen", row) is row
    assert wanted_row({}, "seen", row) is None


def test_scales_without_a_row_are_a_row() -> None:
    assert list(read_rows({f"{KEYS}_scales": positions(1, 2)}, 1)) == [f"{KEYS}_scales"]


def test_names_say_what_belongs_to_a_cache() -> None:
    assert is_kv_row(KEYS)
    assert not is_kv_row("blocks.0.routed_attentions.keys")
