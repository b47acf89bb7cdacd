"""The oracle: is what a runner computes what the user's eager model computes?

An `Oracle` holds the traces of one model with their references, computed once and proved to be sensitive to the
inputs; it then judges anything that runs methods by name: a transformed model, a program between two passes, an
artifact. The measures are those of `triptych.compiler.trace`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES, Tolerance
from triptych.compiler.trace import (
    CallTrace,
    Comparison,
    Runs,
    Sensitivity,
    Step,
    TraceOutputs,
    compare,
    perturbations,
    reference,
    replay,
    sensitivity,
)
from triptych.compiler.trace_plans import TracePlan

DRAWS: Final = 8
QUANTIZED_FLOOR: Final = Tolerance(relative=2e-2, kl=1e-3)
NOISES: Final = (1e-6, -1e-6)
CALL_ROLES: Final = {"encode": "encoder(image)", "embed": "token_embedding", "prefill": "prefill", "decode": "decode"}
"""The role that each call of a trace has, by the first word of its label."""
NOISE_FACTOR: Final = 4.0


@dataclass(frozen=True)
class TraceReport:
    """The verdict on one trace.

    `against` names the recipe of the reference. `unseen` lists perturbations that moved the last logits too
    little for the comparison to mean anything. `got` is what the runner gave and `tolerance` what was allowed.
    """

    trace: str
    against: str
    comparison: Comparison
    failures: tuple[str, ...]
    unseen: tuple[str, ...]
    tolerance: Tolerance
    got: TraceOutputs = field(repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """True where everything lies within the tolerance and the comparison could see."""
        return not self.failures and not self.unseen


@dataclass(frozen=True)
class Reference:
    """One trace, what the eager model gives for it, and how far changed inputs move that."""

    trace: CallTrace
    wanted: TraceOutputs
    seen: tuple[Sensitivity, ...]


class Oracle:
    """The references of `model` for some plans, drawn so that the model reacts to a changed first token and image.

    `recipe` names the form of `model` in reports; where it is quantized, its own rounding noise is measured and
    allowed for.
    """

    def __init__(self, model: Model, plans: Sequence[TracePlan], *, recipe: str = "fp32", quantized: bool = False):
        self.model = model
        self.recipe = recipe
        self._quantized = quantized
        self.plans = tuple(plans)

    def of_quantized(self, model: Model) -> Oracle:
        """Return an oracle over the same plans whose reference is `model`, the quantized form of this one's."""
        return Oracle(model, self.plans, recipe="quantized", quantized=True)

    def over(self, plans: Sequence[TracePlan]) -> Oracle:
        """Return an oracle of the same model over other plans."""
        return Oracle(self.model, plans, recipe=self.recipe, quantized=self._quantized)

    @cached_property
    def references(self) -> tuple[Reference, ...]:
        """The traces with their references."""
        return tuple(visible_reference(plan, self.model) for plan in self.plans)

    @cached_property
    def tolerances(self) -> tuple[Tolerance, ...]:
        """What is allowed on each trace before any pass declares more: fp32, or the quantized model's own noise."""
        if not self._quantized:
            return (DEFAULT_TOLERANCES["float32"],) * len(self.references)
        return tuple(rounding_tolerance(self.model, one.trace, one.wanted) for one in self.references)

    def judge(
        self,
        runner: Runs,
        methods: Mapping[str, str],
        *,
        declared: Tolerance | None = None,
        perturbed: bool = False,
        report: Callable[[str], None] = lambda name: None,
    ) -> Iterator[TraceReport]:
        """Play every trace on `runner` and compare; `methods` maps roles to its method names.

        `declared` widens the tolerance to what passes have declared. With `perturbed` the runner itself must
        also react to changed inputs.
        """
        for one, tolerance in zip(self.references, self.tolerances, strict=True):
            report(one.trace.name)
            yield self._verdict(one, runner, methods, wider(tolerance, declared), perturbed=perturbed)

    def judge_whole(
        self, runner: Runs, methods: Mapping[str, str], declared: Tolerance | None = None
    ) -> Iterator[TraceReport]:
        """Judge a runner that keeps no past: each trace is prefilled whole, from position 0."""
        for one, tolerance in zip(self.whole_references, self.tolerances, strict=True):
            yield self._verdict(one, runner, methods, wider(tolerance, declared), perturbed=False)

    @cached_property
    def whole_references(self) -> tuple[Reference, ...]:
        """The traces with each prefilled whole, and their references."""
        wholes = [
            dataclasses.replace(one.trace, steps=(Step("prefill", len(one.trace.tokens)),)) for one in self.references
        ]
        return tuple(
            Reference(whole, reference(self.model, whole), one.seen)
            for whole, one in zip(wholes, self.references, strict=True)
        )

    def _verdict(
        self, one: Reference, runner: Runs, methods: Mapping[str, str], tolerance: Tolerance, *, perturbed: bool
    ) -> TraceReport:
        got = replay(runner, one.trace, methods)
        moved = list(one.seen)
        if perturbed:
            changed = [
                (f"artifact, {other.name}", replay(runner, other, methods))
                for other in changed_traces(one.trace, self.model.metadata.vocab_size)
            ]
            moved += sensitivity(got, changed)
        comparison = compare(one.trace, one.wanted, got, tolerance)
        return TraceReport(
            one.trace.name,
            self.recipe,
            comparison,
            comparison.failures(tolerance),
            tuple(unseen(moved)),
            tolerance,
            got,
        )


@dataclass(frozen=True)
class Failure:
    """What is wrong with a trace, and the role of the method whose call gave the first wrong output, if one did."""

    trace: str
    reason: str
    role: str | None

    def __str__(self) -> str:
        return f"{self.trace}: {self.reason}"


def first_failure(reports: Iterable[TraceReport]) -> Failure | None:
    """Return what is wrong with the first trace that did not pass, or None; later traces are not played."""
    for one in reports:
        if not one.passed:
            wrong = (call.label for call in one.comparison.outputs if not call.within(one.tolerance))
            label = next(wrong, None)
            role = None if label is None else CALL_ROLES[label.partition("@")[0].partition(" ")[0]]
            return Failure(one.trace, (*one.failures, *one.unseen)[0], role)
    return None


def wider(tolerance: Tolerance, declared: Tolerance | None) -> Tolerance:
    """Return the larger of both in each measure."""
    if declared is None:
        return tolerance
    return Tolerance(max(tolerance.relative, declared.relative), max(tolerance.kl, declared.kl))


def visible_reference(plan: TracePlan, model: Model) -> Reference:
    """Draw inputs until the reference itself reacts to a changed input; the last draw stands where none does."""
    for seed in range(DRAWS):
        trace = plan.draw(seed)
        wanted = reference(model, trace)
        changed = changed_traces(trace, model.metadata.vocab_size)
        seen = sensitivity(wanted, [(one.name, reference(model, one)) for one in changed])
        if not any(unseen(seen)):
            break
    return Reference(trace, wanted, seen)


def unseen(moves: Sequence[Sensitivity]) -> Iterator[str]:
    """Say which perturbations moved the last logits too little."""
    for one in moves:
        if not one.sees(DEFAULT_TOLERANCES["float32"]):
            yield f"{one.trace}: the last logits moved by {one.moved:.2g} only"


def changed_traces(trace: CallTrace, vocab_size: int) -> Iterator[CallTrace]:
    """Yield the perturbed traces in their shortest form: all but the last position prefilled."""
    for one in perturbations(trace, vocab_size):
        length = len(one.tokens)
        steps = (Step("prefill", length - 1), Step("decode", 1)) if length > 1 else (Step("prefill", 1),)
        yield dataclasses.replace(one, steps=steps)


def rounding_tolerance(model: Model, trace: CallTrace, wanted: TraceOutputs) -> Tolerance:
    """Measure how far a quantized model's own rounding moves its outputs, and allow four times as much.

    An int8 activation on the edge of a rounding step falls to either side for a difference of one in a million, and
    layer after layer carries the step on; so two right implementations of one recipe agree only to within this
    noise. It is the worse of what the eager model shows with its token embeddings scaled by 1 + 1e-6 and by 1 - 1e-6:
    one side alone shows nothing in many conversations, whose values happen to lie on the edge's other side.
    """
    noises = [compare(trace, wanted, _scaled(model, trace, 1 + noise), QUANTIZED_FLOOR) for noise in NOISES]
    return Tolerance(
        relative=max(QUANTIZED_FLOOR.relative, NOISE_FACTOR * max(noise.worst_relative for noise in noises)),
        kl=max(QUANTIZED_FLOOR.kl, NOISE_FACTOR * max((kl for noise in noises for kl in noise.kls), default=0.0)),
    )


def _scaled(model: Model, trace: CallTrace, factor: float) -> TraceOutputs:
    """Play `trace` on the eager model with its token embeddings scaled."""
    (name,) = model.metadata.components["embedding"]
    embedding = model.module.get_submodule(name)
    handle = embedding.register_forward_hook(lambda _module, _inputs, output: output * factor)
    try:
        return reference(model, trace)
    finally:
        handle.remove()
