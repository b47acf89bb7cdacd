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
from triptych.compiler.cross_attention import SEEN_ROW, is_encoder_row, kept_encoder_rows
from triptych.compiler.kv_rows import is_kv_row, read_rows, wanted_row
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import Tolerance
from triptych.compiler.roles import PREFILL_FIRST
from triptych.errors import ModelError
from triptych.manifest import CHOSEN_TOKEN
from triptych.modules.routing import HANDLER_NAME

SENSITIVITY_FACTOR: Final = 100.0
EMBED_LABEL: Final = "embed@"


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
        """The logits of the last call, [V], or the token it chose, int64 [], where it gives no logits."""
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
            outputs[f"{EMBED_LABEL}{position}"] = eager.token_embeds[position : position + step.count]
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
            if trace.pixel_values and not call.causal:
                state |= kept_encoder_rows(call, len(trace.pixel_values))
    return TraceOutputs(outputs, state)


def replay(runner: Runs, trace: CallTrace, methods: Mapping[str, str]) -> TraceOutputs:
    """Play `trace` on `runner` from its initial state; `methods` maps roles to method names.

    The slots of key-value rows begin with something in them, as they do once a session was truncated: no slot may be
    read before this conversation has written it, and none may add to what it held. Outputs have the labels that
    `reference` gives; logits are those of the last position, and a method that gives no logits gives the id of the
    token it chose, int64 []. Without a method for the role token_embedding the others are given tokens, and no
    embeddings are among the outputs. A prefill at position 0 takes the method with the role prefill_first, where there
    is one.
    """
    runner.reset_state()
    for name, row in runner.state.items():
        if is_kv_row(name) or (is_encoder_row(name) and name != SEEN_ROW):
            row.fill_(1)
    outputs: dict[str, Tensor] = {}
    position, pictures = 0, _Pictures(runner, trace, methods, outputs)
    # Where one method does both, single tokens take the way of a prompt.
    does_both = methods.get("prefill") == methods.get("decode")
    for step in trace.steps:
        embeds_first = "token_embedding" in methods and (step.kind == "prefill" or does_both)
        for size in [step.count] if step.kind == "prefill" else [1] * step.count:
            tokens = trace.tokens[position : position + size]
            content = {"tokens": tokens.unsqueeze(0)}
            here = torch.eq(tokens, -1 if trace.image_token_id is None else trace.image_token_id)
            image_rows = pictures.rows(int(here.sum()))
            if embeds_first:
                embeds = runner.run(methods["token_embedding"], **content)["embeds"].clone()
                if step.kind == "prefill":
                    outputs[f"{EMBED_LABEL}{position}"] = embeds[0].clone()
                if image_rows is not None:
                    embeds[0, here] = image_rows
                content = {"embeds": embeds}
            role = str(PREFILL_FIRST) if step.kind == "prefill" and position == 0 else step.kind
            if role not in methods:
                role = step.kind
            if role != str(PREFILL_FIRST):  # which takes no position, as it has one only
                content["start_pos"] = torch.tensor([position])
            result = runner.run(methods[role], **content)
            position += size
            outputs[f"{step.kind}@{position}"] = _last_row(result["logits"]) if "logits" in result else _token(result)
    state = read_rows(runner.state, position)
    if not trace.pixel_values:  # then the rows of cross-attention hold nothing yet
        state = {name: row for name, row in state.items() if not is_encoder_row(name)}
    return TraceOutputs(outputs, state)


class _Pictures:
    """Encodes the pictures of a trace, each just before the call that has its placeholder."""

    def __init__(self, runner: Runs, trace: CallTrace, methods: Mapping[str, str], outputs: dict[str, Tensor]) -> None:
        self._runner = runner
        self._method = methods.get("encoder(image)", "")
        self._waiting = list(enumerate(trace.pixel_values))
        self._outputs = outputs
        self._rows: Tensor | None = None

    def rows(self, placeholders: int) -> Tensor | None:
        """Return the embeddings that stand at so many placeholders; None for an encoder that writes state instead.

        Of such an encoder each placeholder is one picture.
        """
        while self._waiting and placeholders > (0 if self._rows is None else len(self._rows)):
            index, pixels = self._waiting.pop(0)
            result = self._runner.run(self._method, pixel_values=pixels)
            if "embeds" not in result:
                placeholders -= 1
                continue
            embeds = result["embeds"].reshape(-1, result["embeds"].shape[-1]).clone()
            self._outputs[f"encode image {index}"] = embeds
            self._rows = embeds if self._rows is None else torch.cat([self._rows, embeds])
        if self._rows is None:
            return None
        used, self._rows = self._rows[:placeholders], self._rows[placeholders:]
        return used


def _last_row(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])[-1].clone()


def _token(result: Mapping[str, Tensor]) -> Tensor:
    return result[CHOSEN_TOKEN].reshape(()).clone()


@dataclass(frozen=True)
class Difference:
    """How one output differs from its reference.

    `relative` is the largest absolute difference over the largest absolute reference value. For logits `kl` is
    KL(reference ‖ candidate) in nats and `greedy` says whether the most likely token is the same; `near_tie`
    marks references whose two best logits lie within the tolerance, where greedy may differ. Of a candidate that gives
    the token alone, `relative` is half of what the reference's best logit is above that token's: no logits within the
    tolerance choose a token that is worse.
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


def compare(
    trace: CallTrace, wanted: TraceOutputs, got: TraceOutputs, tolerance: Tolerance, kept: Tensor | None = None
) -> Comparison:
    """Compare every output and every state row of `got` with `wanted`.

    `kept` are the token ids, int64 [K], that the candidate can give; logits of others are not compared, but none may
    come near those of the kept.
    """
    outputs = [
        _difference(label, value, got.outputs[label], tolerance, kept)
        for label, value in wanted.outputs.items()
        if label in got.outputs
    ]
    state = [
        _difference(name, _without_repeated_heads(expected, row), row, tolerance)
        for name, row in got.state.items()
        if (expected := wanted_row(wanted.state, name, row)) is not None
    ]
    missing = {*(wanted.outputs.keys() ^ got.outputs.keys()), *(set(got.state) - {one.label for one in state})}
    if not any(label.startswith(EMBED_LABEL) for label in got.outputs):  # it embeds tokens inside another method
        missing -= {label for label in wanted.outputs if label.startswith(EMBED_LABEL)}
    return Comparison(trace.name, tuple(outputs), tuple(state), tuple(sorted(missing)))


def _without_repeated_heads(wanted: Tensor, row: Tensor) -> Tensor:
    """Models that repeat key heads for grouped queries show each of them several times."""
    if wanted.dim() == 4 and wanted.shape[2] != row.shape[2] and wanted.shape[2] % row.shape[2] == 0:
        return wanted[:, :, :: wanted.shape[2] // row.shape[2]]
    return wanted


def _difference(
    label: str, wanted: Tensor, got: Tensor, tolerance: Tolerance, kept: Tensor | None = None
) -> Difference:
    if label.startswith(("prefill@", "decode@")):
        if kept is not None and not _only_kept(got, kept, wanted.numel()):
            return Difference(label, float("nan"))
        if not got.is_floating_point():
            return _token_difference(label, wanted if kept is None else _without_others(wanted, kept), got, tolerance)
        if kept is not None:
            wanted, got = wanted[kept], got[kept]
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


def _token_difference(label: str, wanted: Tensor, token: Tensor, tolerance: Tolerance) -> Difference:
    """Judge the id that a candidate chose, int64 [], by the reference's logits."""
    if token.dim() != 0 or not 0 <= int(token) < wanted.numel() or not torch.isfinite(wanted.max()):
        return Difference(label, float("nan"))
    best = wanted.double().topk(2).values
    scale = max(float(wanted[wanted.isfinite()].abs().max()), 1e-12)
    return Difference(
        label,
        float(best[0] - wanted[token].double()) / (2 * scale),
        greedy=bool(wanted.argmax() == token),
        near_tie=float(best[0] - best[1]) <= 2 * tolerance.relative * scale,
    )


def _only_kept(got: Tensor, kept: Tensor, vocab_size: int) -> bool:
    """True where the token given is a kept one, or every kept logit is above all others."""
    if not got.is_floating_point():
        return bool(torch.isin(got, kept).all())
    if got.numel() != vocab_size:
        return False
    others = _others(got, kept)
    return not others.numel() or bool(others.max() < got[kept].min())


def _others(logits: Tensor, kept: Tensor) -> Tensor:
    is_other = torch.ones(logits.numel(), dtype=torch.bool)
    is_other[kept] = False
    return logits[is_other]


def _without_others(logits: Tensor, kept: Tensor) -> Tensor:
    return torch.full_like(logits, float("-inf")).index_copy(0, kept, logits[kept])


def perturbations(trace: CallTrace, vocab_size: int, kept: Tensor | None = None) -> tuple[CallTrace, ...]:
    """Return the trace with another first token, one of `kept` if given, and with one changed patch in its first image.

    The other token stands a third of the vocabulary away.
    """
    tokens = trace.tokens.clone()
    text = [index for index, token in enumerate(tokens.tolist()) if token != trace.image_token_id]
    first = text[0]
    known = list(range(vocab_size)) if kept is None else kept.tolist()
    place = known.index(int(tokens[first])) + 1 + len(known) // 3
    if trace.image_token_id is not None and known[place % len(known)] == trace.image_token_id:
        place += 1
    tokens[first] = known[place % len(known)]
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
