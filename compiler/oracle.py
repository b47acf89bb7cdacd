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

import torch
from torch import Tensor

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
from triptych.manifest import token_ids

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
    allowed for. `kept_tokens` (`triptych.manifest.token_ids`) are the tokens that what is judged can take and give.
    """

    def __init__(
        self,
        model: Model,
        plans: Sequence[TracePlan],
        *,
        recipe: str = "fp32",
        quantized: bool = False,
        kept_tokens: str | None = None,
    ):
        self.model = model
        self.recipe = recipe
        self._quantized = quantized
        self.plans = tuple(plans)
        self.kept_tokens = kept_tokens
        self._kept = None if kept_tokens is None else torch.tensor(token_ids(kept_tokens))
        self._within: dict[str, Oracle] = {}

    def of_quantized(self, model: Model) -> Oracle:
        """Return an oracle over the same plans whose reference is `model`, the quantized form of this one's."""
        return Oracle(model, self.plans, recipe="quantized", quantized=True, kept_tokens=self.kept_tokens)

    def over(self, plans: Sequence[TracePlan]) -> Oracle:
        """Return an oracle of the same model over other plans."""
        return Oracle(self.model, plans, recipe=self.recipe, quantized=self._quantized, kept_tokens=self.kept_tokens)

    def within(self, kept_tokens: str | None) -> Oracle:
        """Return an oracle over conversations of `kept_tokens` alone, which compares no other logits."""
        if kept_tokens == self.kept_tokens or kept_tokens is None:
            return self
        if kept_tokens not in self._within:
            ids = torch.tensor(token_ids(kept_tokens))
            plans = [plan.within(ids) for plan in self.plans]
            self._within[kept_tokens] = Oracle(
                self.model, plans, recipe=self.recipe, quantized=self._quantized, kept_tokens=kept_tokens
            )
        return self._within[kept_tokens]

    @cached_property
    def references(self) -> tuple[Reference, ...]:
        """The traces with their references."""
        return tuple(visible_reference(plan, self.model, self._kept) for plan in self.plans)

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
            if self._has_late_state(one.trace):
                continue
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

    def _has_late_state(self, trace: CallTrace) -> bool:
        """True where a picture becomes state after the first position, which no single prefill can do."""
        image = self.model.metadata.image
        late = trace.tokens[len(image.prefix) + 1 if image else 0 :]
        return image is not None and image.tokens == 0 and bool((late == image.token_id).any())

    def _verdict(
        self, one: Reference, runner: Runs, methods: Mapping[str, str], tolerance: Tolerance, *, perturbed: bool
    ) -> TraceReport:
        got = replay(runner, one.trace, methods)
        moved = list(one.seen)
        if perturbed:
            moved += self._own_moves(one.trace, got, runner, methods)
        comparison = compare(one.trace, one.wanted, got, tolerance, self._kept)
        return TraceReport(
            one.trace.name,
            self.recipe,
            comparison,
            comparison.failures(tolerance),
            tuple(unseen(moved)),
            tolerance,
            got,
        )

    def _own_moves(
        self, trace: CallTrace, got: TraceOutputs, runner: Runs, methods: Mapping[str, str]
    ) -> tuple[Sensitivity, ...]:
        """Measure how far changed inputs move the runner's own logits: those of a prefill where decode gives none."""
        last = "decode"
        if not got.last_logits.is_floating_point():
            last = "prefill"
            got = replay(runner, dataclasses.replace(trace, steps=(Step(last, len(trace.tokens)),)), methods)
        others = changed_traces(trace, self.model.metadata.vocab_size, self._kept, last)
        changed = [(f"artifact, {other.name}", replay(runner, other, methods)) for other in others]
        return _moves(got, changed, self._kept)


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


def visible_reference(plan: TracePlan, model: Model, kept: Tensor | None = None) -> Reference:
    """Draw inputs until the reference itself reacts to a changed input; the last draw stands where none does."""
    for seed in range(DRAWS):
        trace = plan.draw(seed)
        wanted = reference(model, trace)
        changed = changed_traces(trace, model.metadata.vocab_size, kept)
        seen = _moves(wanted, [(one.name, reference(model, one)) for one in changed], kept)
        if not any(unseen(seen)):
            break
    return Reference(trace, wanted, seen)


def unseen(moves: Sequence[Sensitivity]) -> Iterator[str]:
    """Say which perturbations moved the last logits too little."""
    for one in moves:
        if not one.sees(DEFAULT_TOLERANCES["float32"]):
            yield f"{one.trace}: the last logits moved by {one.moved:.2g} only"


def changed_traces(
    trace: CallTrace, vocab_size: int, kept: Tensor | None = None, last: str = "decode"
) -> Iterator[CallTrace]:
    """Yield the perturbed traces in their shortest form: all but the last position prefilled, or the `last` one too.

    `kept` are the tokens that may take the place of others, None for all.
    """
    for one in perturbations(trace, vocab_size, kept):
        length = len(one.tokens)
        decodes = last == "decode" and length > 1
        steps = (Step("prefill", length - 1), Step("decode", 1)) if decodes else (Step("prefill", length),)
        yield dataclasses.replace(one, steps=steps)


def _moves(
    outputs: TraceOutputs, perturbed: Sequence[tuple[str, TraceOutputs]], kept: Tensor | None
) -> tuple[Sensitivity, ...]:
    """Measure how far each perturbed trace moved the last logits, those of the `kept` tokens where these are given."""
    if kept is None:
        return sensitivity(outputs, perturbed)

    def only(one: TraceOutputs) -> TraceOutputs:
        return TraceOutputs({"last": one.last_logits[kept]}, {})

    return sensitivity(only(outputs), [(name, only(one)) for name, one in perturbed])


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
