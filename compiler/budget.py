"""Budgets: upper limits on what a method costs, as text and as objects, and who broke one.

``decode.bytes<=60MB``, ``prefill.flops@S=128<1.5G``, ``*.peak_live_bytes<=10MiB``: a method ("*" is every method), a
number of `MethodCost`, for it the sizes of dynamic dimensions (default: their maximum), and the limit.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Final

from triptych.compiler.cost import method_cost, program_cost
from triptych.compiler.program import Program
from triptych.errors import PipelineError, UsageError

EVERY_METHOD: Final = "*"
METRICS: Final = ("flops", "bytes", "bytes_read", "bytes_written", "constant_bytes", "peak_live_bytes")
RELATIONS: Final[Mapping[str, Callable[[int, int], bool]]] = MappingProxyType({"<=": operator.le, "<": operator.lt})
_PLAIN: Final = {"G": 10**9, "M": 10**6, "K": 10**3}
_DECIMAL: Final = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
_BINARY: Final = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_NAME: Final = r"[A-Za-z_]\w*"
_BUDGET: Final = re.compile(
    rf"(?P<method>\*|{_NAME})\.(?P<metric>\w+)(?:@(?P<sizes>{_NAME}=\d+(?:&{_NAME}=\d+)*))?"
    r"\s*(?P<relation><=|<)\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[A-Za-z]*)",
    re.ASCII,
)


class BudgetError(PipelineError):
    """A program costs more than `budget` allows."""

    def __init__(self, message: str, budget: Budget) -> None:
        super().__init__(message)
        self.budget = budget


@dataclass(frozen=True)
class Budget:
    """A limit on one number of a method's cost, in FLOPs or bytes.

    `method` is a name or "*", `metric` one of `METRICS`, `relation` one of `RELATIONS`; `sizes` gives dynamic
    dimensions by name. Raises `UsageError` for anything else.
    """

    method: str
    metric: str
    relation: str
    limit: int
    sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"no budget for {self.metric!r}; there is one for {', '.join(METRICS)}")
        if self.relation not in RELATIONS:
            raise UsageError(f"a budget cannot say {self.relation!r}; it says {' or '.join(RELATIONS)}")
        names = [name for name, _ in self.sizes]
        if len(set(names)) != len(names):
            raise UsageError(
                f"a budget gives the size {next(n for n in names if names.count(n) > 1)!r} twice; give it once"
            )
        if self.limit < 0:
            raise UsageError(f"the budget of {self._named(self.method)} is {self.limit}; expected 0 or more")
        if _BUDGET.fullmatch(str(self)) is None:
            raise UsageError(f"{self._named(self.method)!r} cannot have a budget; expected such as decode.bytes@S=128")

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget such as ``decode.bytes<=60MB``; raises `UsageError`."""
        found = _BUDGET.fullmatch(text.strip())
        if found is None:
            raise UsageError(f"{text.strip()!r} is no budget; expected one such as decode.bytes<=60MB")
        metric, unit = found["metric"], found["unit"]
        units = _PLAIN if metric == "flops" else {**_PLAIN, **_DECIMAL, **_BINARY}
        if unit and unit not in units:
            known = ", ".join(units)
            raise UsageError(f"{text.strip()!r} counts in {unit!r}; {metric} is counted in {known}, or without a unit")
        limit = Fraction(found["number"]) * units.get(unit, 1)
        if limit.denominator != 1:
            raise UsageError(f"{text.strip()!r} sets a limit of {float(limit)}; expected a whole number")
        pairs = [pair.split("=") for pair in (found["sizes"] or "").split("&") if pair]
        sizes = tuple((name, int(size)) for name, size in pairs)
        return cls(found["method"], metric, found["relation"], int(limit), sizes)

    def __str__(self) -> str:
        number, unit = self._limit()
        return f"{self._named(self.method)}{self.relation}{number}{unit}"

    def holds(self, value: int) -> bool:
        """Return whether `value` is within the budget."""
        return RELATIONS[self.relation](value, self.limit)

    def value(self, program: Program) -> int | None:
        """Return what the budget limits; for "*" the largest of all methods, None where there is no such method."""
        return max(self._values(program).values(), default=None)

    def overrun(self, program: Program) -> str | None:
        """Say how far `program` is over, "decode.bytes is 71.2 MB, budget 60 MB", or return None.

        Raises `PipelineError` where the program has no such method, `UsageError` where that has no such size.
        """
        values = self._values(program)
        if not values:
            raise PipelineError(
                f"budget {self}: the program has no method {self.method!r}; its methods: {', '.join(program.methods)}, "
                f"and {EVERY_METHOD} stands for all"
            )
        method, value = max(values.items(), key=lambda item: item[1])
        if self.holds(value):
            return None
        shown, limit = self.amount(value), " ".join(self._limit()).strip()
        number, unit = _scaled(value, self._units())
        if self.holds(int(number * self._units()[unit])):
            shown, limit = f"{value:,}", f"{self.limit:,}"
        return f"{self._named(method)} is {shown}, budget {'less than ' if self.relation == '<' else ''}{limit}"

    def amount(self, value: int) -> str:
        """Print `value` to three digits, in units like those of the limit: "71.2 MB"."""
        number, unit = _scaled(value, self._units())
        return f"{number.normalize():,f} {unit}".strip()

    def _values(self, program: Program) -> dict[str, int]:
        if self.method == EVERY_METHOD:
            costs = program_cost(program, dict(self.sizes))
        else:
            names = [self.method] if self.method in program.methods else []
            costs = {name: method_cost(program, name, dict(self.sizes)) for name in names}
        return {name: getattr(cost, self.metric) for name, cost in costs.items()}

    def _named(self, method: str) -> str:
        sizes = "&".join(f"{name}={size}" for name, size in self.sizes)
        return f"{method}.{self.metric}" + (f"@{sizes}" if sizes else "")

    def _units(self) -> Mapping[str, int]:
        """Return the units that values are shown in: those of the limit."""
        families = _families(self.metric)
        return {**next((units for units in families if self._limit()[1] in units), families[0]), "": 1}

    def _limit(self) -> tuple[str, str]:
        """Return number and unit that give the limit exactly: the fewest digits, of these the largest unit."""
        written = [
            (f"{(Decimal(self.limit) / factor).normalize():f}", unit)
            for units in _families(self.metric)
            for unit, factor in units.items()
            if self.limit >= factor and Decimal(self.limit) / factor * factor == self.limit
        ]
        written.append((str(self.limit), ""))
        return min(written, key=lambda one: len(one[0].replace(".", "")))


def find_culprit(budget: Budget, history: Sequence[tuple[str, Program]]) -> str:
    """Say which step broke `budget`: "broken by swap-x: 58 MB → 71 MB".

    `history` holds what each step is called and the program after it, in order. The step is the first that found the
    budget kept and left it broken; where there is none, the budget was broken from the start or never.
    """
    values = [(step, budget.value(program)) for step, program in history]
    for (_, before), (step, after) in itertools.pairwise(values):
        if after is None or budget.holds(after) or (before is not None and not budget.holds(before)):
            continue
        shown = budget.amount(after)
        if before is None:
            return f"broken by {step}, which added {budget.method}: {shown}"
        shown_before = budget.amount(before)
        if shown_before == shown:
            shown_before, shown = f"{before:,}", f"{after:,}"
        return f"broken by {step}: {shown_before} → {shown}"
    first = next(((step, value) for step, value in values if value is not None), None)
    if first is None or budget.holds(first[1]):
        return "kept after every step"
    return f"broken from the start: {budget.amount(first[1])} ({first[0]})"


def _families(metric: str) -> tuple[Mapping[str, int], ...]:
    """Return the families of units in which a limit on `metric` is printed."""
    return (_PLAIN,) if metric == "flops" else (_DECIMAL, _BINARY)


def _scaled(value: int, units: Mapping[str, int]) -> tuple[Decimal, str]:
    """Return `value` to three digits, and its unit."""
    unit, factor = next(((unit, factor) for unit, factor in units.items() if factor <= value), ("", 1))
    number = Decimal(value) / factor
    digits = 0 if factor == 1 or number >= 100 else 1 if number >= 10 else 2
    return round(number, digits), unit
