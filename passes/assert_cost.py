"""``assert-cost``: the pipeline fails where the program costs more than it may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.budget import Budget, BudgetError
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Program


@dataclass(frozen=True)
class AssertCost(ProgramPass):
    """Hold the program to budgets: ``assert-cost{decode.bytes<=60MB,prefill.flops@S=128<=2G}``.

    1. Each of `budgets` is checked, in order, on the program as it is at this place of the pipeline.
    2. The first that is broken fails the pipeline.
    3. The program stays as it is.

    A budget limits one number of one method ("*" is every method): `flops`, `bytes`, `bytes_read`, `bytes_written`,
    `constant_bytes` or `peak_live_bytes`. What it does not say a size for (``@S=128``) stands at its maximum.
    """

    name: ClassVar[str] = "assert-cost"
    may_match_nothing: ClassVar[bool] = True

    budgets: tuple[Budget, ...]

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Return `program` itself; raises `BudgetError` at the first overrun, `PipelineError` for an unknown method."""
        for budget in self.budgets:
            overrun = budget.overrun(program)
            if overrun is not None:
                raise BudgetError(overrun, budget)
        return program
