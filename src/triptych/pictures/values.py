"""Shapes, dtypes, sizes and names as pictures print them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from torch import Tensor

from triptych.manifest import DynamicDim, TensorSignature

MAX_RANGES: Final = 4
MAX_HINT_LINES: Final = 40


def port_text(port: TensorSignature) -> str:
    """Return name, dtype and shape of an input or output, dynamic dimensions with their range."""
    sizes = [
        f"{dim.name}={dim.minimum}…{dim.maximum}" if isinstance(dim, DynamicDim) else str(dim) for dim in port.shape
    ]
    return f"{port.name}: {port.dtype}[{', '.join(sizes)}]"


def bytes_text(count: int) -> str:
    """Return a size in bytes with three digits, decimal units."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"


def counted(count: int, noun: str) -> str:
    """Return "1 row" or "30 rows"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def hint_text(lines: Iterable[str]) -> str:
    """Return the lines of a hint, cut where a screen ends."""
    found = list(lines)
    more = [f"and {len(found) - MAX_HINT_LINES} more"] if len(found) > MAX_HINT_LINES else []
    return "\n".join(found[:MAX_HINT_LINES] + more)


def times(name: str, count: int) -> str:
    """Return "linear" for one, and for more the name and the count behind a multiplication sign."""
    return name if count == 1 else f"{name}\N{NO-BREAK SPACE}\N{MULTIPLICATION SIGN}{count}"


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of a node's value, which is one, a sequence of values, or something else."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


# ---------------------------------------------------------------------------------------------------- names


def name_pattern(name: str) -> str:
    """Return a dotted name with "*" for its numbers: equal for names that differ by layer number only."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def folded_name(names: Sequence[str]) -> str:
    """Return one name for names of equal pattern: ``layers.0…29.cache.keys``."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(_folded_part(sorted(set(column))) for column in columns)


def _folded_part(parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return parts[0]
    return number_ranges(int(part) for part in parts)


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers in short: 0, 1, 2, 5 → "0…2,5"; more than a few ranges are cut in the middle."""
    ranges = []
    for _, group in itertools.groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        ranges.append(str(run[0]) if len(run) == 1 else f"{run[0]}…{run[-1]}")
    if len(ranges) > MAX_RANGES:
        ranges = [*ranges[: MAX_RANGES - 1], "…", ranges[-1]]
    return ",".join(ranges)
