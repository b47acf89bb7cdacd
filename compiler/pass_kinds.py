"""The contract of a pass, in three kinds.

A pass is a frozen dataclass: its fields are its options, `name` is its name in pipeline texts, and its
docstring states the rewrite. It reports every match and every refusal to the `MatchLog` it is handed;
everything else that is known of a run (timing, verification, change) is the manager's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final

from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Model
from triptych.compiler.program import Method, Program


@dataclass(frozen=True)
class Tolerance:
    """How far a pass may move a value: relative to the largest reference value, and in KL on logits."""

    relative: float
    kl: float


DEFAULT_TOLERANCES: Final[Mapping[str, Tolerance]] = MappingProxyType(
    {
        "float32": Tolerance(relative=1e-4, kl=1e-6),
        "bfloat16": Tolerance(relative=2e-2, kl=1e-3),
        "float16": Tolerance(relative=5e-3, kl=1e-4),
    }
)


@dataclass(frozen=True)
class Refusal:
    """A place a pass looked at and left alone, with the reason."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass
class MatchLog:
    """What a pass matched and refused in one run."""

    matches: list[str] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def matched(self, where: str) -> None:
        """Record one rewritten place."""
        self.matches.append(where)

    def refused(self, where: str, reason: str) -> None:
        """Record one place left alone, and why."""
        self.refusals.append(Refusal(where, reason))


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes; authors derive from one of the three kinds below.

    `requires` and `ensures` are named properties: what an earlier pass of the pipeline must have ensured,
    and what holds afterwards. `after` and `before` are names of passes. A pass that matches nothing fails the
    pipeline unless `may_match_nothing`.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    after: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    may_match_nothing: ClassVar[bool] = False
    tolerances: ClassVar[Mapping[str, Tolerance]] = DEFAULT_TOLERANCES


class SourceTransform(Pass):
    """Changes an `nn.Module` before capture."""

    @abstractmethod
    def transform(self, model: Model, log: MatchLog) -> Model:
        """Return the changed model. `model.module` is the pass's own copy: change it in place."""


class GraphPass(Pass):
    """Changes one method's graph; called once a method."""

    @abstractmethod
    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Edit the graph through `editor`; `method` says roles and ports."""


class ProgramPass(Pass):
    """Changes the program as a whole: adds, drops, merges or renames methods."""

    @abstractmethod
    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Return the changed program."""
