"""The contract of a pass, in three kinds.

A pass is a frozen dataclass: its fields are its options, `name` is its name in pipeline texts, and its
docstring states the rewrite. It announces every match to the `MatchLog` it is handed before it rewrites it, and
says why it leaves a place alone; everything else that is known of a run is the manager's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar, Final

from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Model
from triptych.compiler.program import Method, Program
from triptych.compiler.properties import Property
from triptych.compiler.provenance import layer_in, layer_of, source_line


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
class Match:
    """A place a pass rewrote: what it is called, in which method and layer, and the model's source line behind it."""

    where: str
    method: str | None = None
    layer: str | None = None
    line: str | None = None

    def __str__(self) -> str:
        return f"{self.method}: {self.where}" if self.method else self.where


@dataclass(frozen=True)
class Refusal:
    """A place a pass looked at and left alone, with the reason."""

    where: str
    reason: str
    method: str | None = None
    line: str | None = None

    def __str__(self) -> str:
        place = f"{self.method}: {self.where}" if self.method else self.where
        return f"{place}: {self.reason}" + (f" ({self.line})" if self.line else "")


@dataclass
class MatchLog:
    """What a pass matches and refuses in one run over a model, a program, or one method of it.

    `select` decides by the running number of a match whether it may be rewritten; bisection narrows it down.
    """

    method: str | None = None
    select: Callable[[int], bool] = lambda number: True
    matches: list[Match] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    asked: int = 0

    def match(self, where: str | Node) -> bool:
        """Announce a place before rewriting it; where this returns False, leave the place as it is."""
        number, self.asked = self.asked, self.asked + 1
        if not self.select(number):
            return False
        if isinstance(where, Node):
            self.matches.append(Match(where.name, self.method, layer_of(where), source_line(where)))
        else:
            self.matches.append(Match(where, self.method, layer_in(where)))
        return True

    def refused(self, where: str | Node, reason: str) -> None:
        """Record one place left alone, and why."""
        line = source_line(where) if isinstance(where, Node) else None
        self.refusals.append(Refusal(where.name if isinstance(where, Node) else where, reason, self.method, line))


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes; authors derive from one of the three kinds below.

    `requires` and `ensures` are properties of a program (`triptych.compiler.properties`): what an earlier pass of
    the pipeline must have ensured, and what holds afterwards; both are checked on the program too where the
    property can be. `after` and `before` are names of passes. A pass that matches nothing fails the pipeline
    unless `may_match_nothing`. `uniform` promises the same number of matches in every layer of a stack, in every
    method. `tolerances` says by dtype how far the pass may move a value. The matches of an `indivisible` pass
    mean something only together, so bisection does not take them apart.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Property]] = frozenset()
    ensures: ClassVar[frozenset[Property]] = frozenset()
    after: ClassVar[frozenset[str]] = frozenset()
    before: ClassVar[frozenset[str]] = frozenset()
    may_match_nothing: ClassVar[bool] = False
    uniform: ClassVar[bool] = False
    indivisible: ClassVar[bool] = False
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
        """Edit the graph through `editor` where `log.match(node)` says so; `method` says roles and ports."""


class ProgramPass(Pass):
    """Changes the program as a whole: adds, drops, merges or renames methods."""

    @abstractmethod
    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Return the changed program."""
