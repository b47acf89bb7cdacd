"""The call-trace oracle: parity as the whole project means it.

A `CallTrace` is one teacher-forced conversation: encode the images, then prefill and decode in the given steps
with state flowing. `reference` plays it on the user's own model (whole sequences, no cache, no pass), `replay` on
anything that runs methods by name, and `compare` looks at every output and at the final state. `sensitivity`
proves that the comparison can see: a changed first token and a changed image patch must move the last logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from triptych.compiler.attention import recorded_attention
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import Tolerance
from triptych.errors import ModelError
from triptych.modules.routing import HANDLER_NAME

SENSITIVITY_FACTOR: Final = 100.0


class Runs(Protocol):
    """What can replay a trace: a loaded artifact."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The live state rows."""

    def run(self, method: str, **tensors: Tensor) -> dict[str, Tensor]:
        """Run a method."""

    def reset_state(self) -> None:
        """Put the initial state back."""


@dataclass(frozen=True)
class Step:
    """`count` positions in one prefill ("prefill"), or one by one ("decode")."""

    kind: str
    count: int


@dataclass(frozen=True)
class CallTrace:
    """One conversation. `tokens` int64 [L] holds an image's placeholder id once for each of its embeddings.

    `steps` cover the L positions in order; an image block lies within one prefill.
    """

    name: str
    tokens: Tensor
    steps: tuple[Step, ...]
    pixel_values: tuple[Tensor, ...] = ()
    image_token_id: int | None = None

    def __post_init__(self) -> None:
        covered = sum(step.count for step in self.steps)
        if covered != len(self.tokens):
            raise ModelError(
                f"trace {self.name!r}: steps cover {covered} positions, there are {len(self.tokens)} tokens"
            )


@dataclass(frozen=True)
class TraceOutputs:
    """Every output by its label ("prefill@17" gives the logits after 17 positions), and the final state."""

    outputs: Mapping[str, Tensor]
    state: Mapping[str, Tensor]

    @property
    def last_logits(self) -> Tensor:
        """The logits of the last call, [V]."""
        return list(self.outputs.values())[-1]


def reference(model: Model, trace: CallTrace) -> TraceOutputs:
    """Play `trace` on the user's eager model; raises `ModelError` where the description names no reference.

    Keys and values come from the model's own attention calls, by the module that made them.
    """
    if model.eager is None:
        raise ModelError("the model description has no eager reference; give Model(eager=…) to compare with")
    in_training = [module for module in model.module.modules() if module.training]
    model.module.eval()
    try:
        with torch.no_grad(), recorded_attention(model.module) as calls:
            eager = model.eager(model.module, trace.tokens, trace.pixel_values)
    finally:
        for module in in_training:
            module.training = True
    outputs: dict[str, Tensor] = {}
    for index, embeds in enumerate(eager.image_embeds):
        outputs[f"encode image {index}"] = embeds
    position = 0
    for step in trace.steps:
        if step.kind == "prefill":
            outputs[f"embed@{position}"] = eager.token_embeds[position : position + step.count]
            position += step.count
            outputs[f"prefill@{position}"] = eager.logits[position - 1]
        else:
            for _ in range(step.count):
                position += 1
                outputs[f"decode@{position}"] = eager.logits[position - 1]
    state = dict(eager.state)
    for call in calls:
        if call.query.shape[2] == len(trace.tokens):
            prefix = f"{call.owner}.{HANDLER_NAME}" if call.owner else HANDLER_NAME
            state[f"{prefix}.cache.keys"] = call.key.transpose(1, 2)
            state[f"{prefix}.cache.values"] = call.value.transpose(1, 2)
    return TraceOutputs(outputs, state)


def replay(runner: Runs, trace: CallTrace, methods: Mapping[str, str]) -> TraceOutputs:
    """Play `trace` on `runner` from its initial state; `methods` maps roles to method names.

    The slots of key-value rows begin with something in them, as they do once a session was truncated: no slot may be
    read before this conversation has written it, and none may add to what it held. Outputs have the labels that
    `reference` gives; logits are those of the last position.
    """
    runner.reset_state()
    for name, row in runner.state.items():
        if HANDLER_NAME in name.split("."):
            row.fill_(1)
    outputs: dict[str, Tensor] = {}
    images = []
    for index, pixels in enumerate(trace.pixel_values):
        embeds = runner.run(methods["encoder(image)"], pixel_values=pixels)["embeds"]
        outputs[f"encode image {index}"] = embeds.clone()
        images.append(embeds.clone())
    position, image_rows = 0, torch.cat(images) if images else None
    for step in trace.steps:
        tokens = trace.tokens[position : position + step.count]
        if step.kind == "prefill":
            embeds = runner.run(methods["token_embedding"], tokens=tokens.unsqueeze(0))["embeds"].clone()
            outputs[f"embed@{position}"] = embeds[0].clone()
            if image_rows is not None:
                here = torch.eq(tokens, trace.image_token_id or 0)
                count = int(here.sum())
                used, image_rows = image_rows[:count], image_rows[count:]
                embeds[0, here] = used
            start = torch.tensor([position])
            logits = runner.run(methods["prefill"], embeds=embeds, start_pos=start)["logits"]
            position += step.count
            outputs[f"prefill@{position}"] = _last_row(logits)
        else:
            for token in tokens:
                start = torch.tensor([position])
                logits = runner.run(methods["decode"], tokens=token.reshape(1, 1), start_pos=start)["logits"]
                position += 1
                outputs[f"decode@{position}"] = _last_row(logits)
    state = {
        name: (row[:, :position] if HANDLER_NAME in name.split(".") else row).clone()
        for name, row in runner.state.items()
    }
    return TraceOutputs(outputs, state)


def _last_row(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])[-1].clone()


@dataclass(frozen=True)
class Difference:
    """How one output differs from its reference.

    `relative` is the largest absolute difference over the largest absolute reference value. For logits `kl` is
    KL(reference ‖ candidate) in nats and `greedy` says whether the most likely token is the same; `near_tie`
    marks references whose two best logits lie within the tolerance, where greedy may differ.
    """

    label: str
    relative: float
    kl: float | None = None
    greedy: bool | None = None
    near_tie: bool = False

    def within(self, tolerance: Tolerance) -> bool:
        """True where every measure holds; NaN never does."""
        return (
            self.relative <= tolerance.relative
            and (self.kl is None or self.kl <= tolerance.kl)
            and (self.greedy is None or self.greedy or self.near_tie)
        )


@dataclass(frozen=True)
class Comparison:
    """The differences of one trace, outputs first, then state rows; `missing` has no counterpart."""

    trace: str
    outputs: tuple[Difference, ...]
    state: tuple[Difference, ...]
    missing: tuple[str, ...]

    def failures(self, tolerance: Tolerance) -> tuple[str, ...]:
        """Say what is outside `tolerance`, worst first; empty means parity."""
        out = [one for one in (*self.outputs, *self.state) if not one.within(tolerance)]
        out.sort(key=lambda one: -one.relative if one.relative == one.relative else float("-inf"))
        return (
            *(f"{name}: no counterpart to compare with" for name in self.missing),
            *(
                f"{one.label}: relative {one.relative:.3g}, KL {_text(one.kl)}, greedy {_text(one.greedy)}"
                for one in out
            ),
        )

    @property
    def worst_relative(self) -> float:
        """The largest relative difference of outputs and state."""
        return max((one.relative for one in (*self.outputs, *self.state)), default=0.0)

    @property
    def kls(self) -> tuple[float, ...]:
        """KL of every logits output, in nats."""
        return tuple(one.kl for one in self.outputs if one.kl is not None)


def _text(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float)
        else "same"
        if value is True
        else "differs"
        if value is False
        else "-"
    )


def compare(trace: CallTrace, wanted: TraceOutputs, got: TraceOutputs, tolerance: Tolerance) -> Comparison:
    """Compare every output and every state row of `got` with `wanted`."""
    outputs = [
        _difference(label, value, got.outputs[label], tolerance)
        for label, value in wanted.outputs.items()
        if label in got.outputs
    ]
    state = [
        _difference(name, _without_repeated_heads(wanted.state[name], row), row, tolerance)
        for name, row in got.state.items()
        if name in wanted.state
    ]
    missing = [*(wanted.outputs.keys() ^ got.outputs.keys()), *(got.state.keys() - wanted.state.keys())]
    return Comparison(trace.name, tuple(outputs), tuple(state), tuple(sorted(missing)))


def _without_repeated_heads(wanted: Tensor, row: Tensor) -> Tensor:
    """Models that repeat key heads for grouped queries show each of them several times."""
    if wanted.dim() == 4 and wanted.shape[2] != row.shape[2] and wanted.shape[2] % row.shape[2] == 0:
        return wanted[:, :, :: wanted.shape[2] // row.shape[2]]
    return wanted


def _difference(label: str, wanted: Tensor, got: Tensor, tolerance: Tolerance) -> Difference:
    if wanted.shape != got.shape or not torch.isfinite(got).all() or not torch.isfinite(wanted).all():
        return Difference(label, float("nan"))
    wanted, got = wanted.double(), got.double()
    scale = max(float(wanted.abs().max()), 1e-12) if wanted.numel() else 1.0
    relative = float((wanted - got).abs().max()) / scale if wanted.numel() else 0.0
    if not label.startswith(("prefill@", "decode@")):
        return Difference(label, relative)
    expected, actual = wanted.log_softmax(-1), got.log_softmax(-1)
    best = wanted.topk(2).values
    return Difference(
        label,
        relative,
        kl=max(0.0, float((expected.exp() * (expected - actual)).sum())),
        greedy=bool(wanted.argmax() == got.argmax()),
        near_tie=float(best[0] - best[1]) <= 2 * tolerance.relative * scale,
    )


def perturbations(trace: CallTrace, vocab_size: int) -> tuple[CallTrace, ...]:
    """Return the trace with another first token, and with one changed patch in its first image."""
    tokens = trace.tokens.clone()
    text = [index for index, token in enumerate(tokens.tolist()) if token != trace.image_token_id]
    first = text[0]
    step = 1 + vocab_size // 3
    tokens[first] = (tokens[first] + step) % vocab_size
    if trace.image_token_id is not None and int(tokens[first]) == trace.image_token_id:
        tokens[first] = (tokens[first] + 1) % vocab_size
    changed = [dataclasses.replace(trace, name=f"{trace.name}, first token changed", tokens=tokens)]
    if trace.pixel_values:
        pixels = trace.pixel_values[0].clone()
        height, width = pixels.shape[-2] // 2, pixels.shape[-1] // 2
        pixels[..., :height, :width] = -pixels[..., :height, :width] + 0.5
        changed.append(
            dataclasses.replace(
                trace, name=f"{trace.name}, image patch changed", pixel_values=(pixels, *trace.pixel_values[1:])
            )
        )
    return tuple(changed)


@dataclass(frozen=True)
class Sensitivity:
    """How far a perturbation moved the last logits, relative to their largest value."""

    trace: str
    moved: float

    def sees(self, tolerance: Tolerance) -> bool:
        """True where the move is at least 100 times what the comparison forgives."""
        return self.moved >= SENSITIVITY_FACTOR * tolerance.relative


def sensitivity(outputs: TraceOutputs, perturbed: Sequence[tuple[str, TraceOutputs]]) -> tuple[Sensitivity, ...]:
    """Measure how far each perturbed trace moved the last logits of `outputs`."""
    base = outputs.last_logits.double()
    scale = max(float(base.abs().max()), 1e-12)
    return tuple(
        Sensitivity(name, float((other.last_logits.double() - base).abs().max()) / scale) for name, other in perturbed
    )
