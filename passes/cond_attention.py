"""``cond-attention``: cross-attention keeps the keys and values of its encoder input as state."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn

from triptych.compiler.attention import AttentionCall
from triptych.compiler.cross_attention import (
    ENCODER_PRESENT,
    ENCODER_STATES,
    OwnerCall,
    calls_of_module,
    cross_attention_calls,
    example,
    owner_calls,
    takes_encoder_states,
)
from triptych.compiler.model import EntryPoint, Model, OutputPort
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES, MatchLog, SourceTransform
from triptych.compiler.program_runner import ModelRunner
from triptych.errors import PipelineError
from triptych.manifest import DynamicDim, TensorSignature
from triptych.modules.cross_attention import (
    CROSS_ATTENTION_NAME,
    ENCODER_INPUT_NAME,
    CrossAttention,
    CrossAttentionCache,
    EncoderInputState,
    Presence,
    encoder_input,
)
from triptych.modules.routing import route_attention

NAME: Final = "cond-attention"


@dataclass(frozen=True)
class CondAttention(SourceTransform):
    """Let a call attend to the encoder input of an earlier call.

    1. An entry point describes the branch "encoder input present or not" by two inputs: ``encoder_states``
       [1, T, D], and ``encoder_present``, bool [1]. Its forward does what the model does with them in one call.
    2. Every module whose one ``scaled_dot_product_attention`` call there has keys and values that follow
       ``encoder_states`` and nothing else gets buffers [1, T, heads, head_dim] for them. That is found out by running
       the entry point on changed inputs.
    3. Where ``encoder_states`` is linked to an output of another entry point, an encoder, that one computes the keys
       and values of all layers and writes them; if it gave nothing else, it now gives ``encoder_present``, true. The
       others lose both inputs: they only read, and hold no projection of keys and values any more.
    4. Where it comes from outside, both inputs stay. ``torch.cond`` chooses between the new and the kept keys
       and values, and the choice is written; the projections stand before it. Without a new encoder input
       ``encoder_states`` may hold anything, NaN included.
    5. In the place of ``encoder_present`` the forward is told whether any call so far brought an encoder input.

    Each changed entry point is run against the one described: with an encoder input, later without, and before any
    came. A model that keeps or uses something else of its encoder input fails there.
    """

    name: ClassVar[str] = NAME
    before: ClassVar[frozenset[str]] = frozenset({"static-kv-cache"})
    indivisible: ClassVar[bool] = True

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Route cross-attention through caches; raises `PipelineError` where that would change what is computed."""
        entries = [entry for entry in model.entry_points if takes_encoder_states(entry)]
        if not entries:
            log.refused("the model", f"no entry point takes {ENCODER_STATES} and {ENCODER_PRESENT}")
            return model
        producer = _producer(model, entries)
        owners = _owners(model, entries, log, written_by_encoder=producer is not None)
        if not owners or not all(log.match(owner) for owner in owners):
            return model
        before = model.with_own_modules()
        if any(_follows_presence(before, entry) for entry in entries):
            model.module.add_module(ENCODER_INPUT_NAME, EncoderInputState())
        for owner, call in owners.items():
            heads, length = call.key.shape[1:3]
            cache = CrossAttentionCache(length, heads, call.key.shape[3], call.value.shape[3], call.key.dtype)
            route_attention(model.module.get_submodule(owner), CrossAttention(cache), CROSS_ATTENTION_NAME)
        changed = {entry.name: _choosing(entry) if producer is None else _reading(entry) for entry in entries}
        if producer is not None:
            changed[producer.entry.name] = _writing(producer, owner_calls(before, entries[0], list(owners)))
        model = dataclasses.replace(
            model, entry_points=tuple(changed.get(entry.name, entry) for entry in model.entry_points)
        )
        for entry in entries:
            _check_same(before, model, entry, producer)
        return model


# ---------------------------------------------------------------------------------------------------- what matches


@dataclass(frozen=True)
class _Producer:
    """The entry point that gives ``encoder_states``, and the number of the output that it is."""

    entry: EntryPoint
    output: int


def _producer(model: Model, entries: Sequence[EntryPoint]) -> _Producer | None:
    """Return the one entry point linked to ``encoder_states``; None where the caller gives it."""
    ports = [_port(entry, ENCODER_STATES) for entry in entries]
    for entry, port in zip(entries, ports, strict=True):
        if any(isinstance(dim, DynamicDim) for dim in port.shape) or len(port.shape) != 3 or port.shape[0] != 1:
            raise PipelineError(
                f"{NAME}: {ENCODER_STATES} of {entry.name} has shape {list(port.shape)}; the rows that keep it are "
                "[1, T, D] with a fixed number of positions T, so describe it that way"
            )
        if port.shape != ports[0].shape or port.links != ports[0].links:
            raise PipelineError(
                f"{NAME}: {ENCODER_STATES} of {entry.name} is {list(port.shape)} from {port.links}, and of "
                f"{entries[0].name} {list(ports[0].shape)} from {ports[0].links}; describe one encoder input for all"
            )
    names = {entry.name: entry for entry in model.entry_points}
    found = [
        _Producer(names[method], index)
        for method, _, output in (link.partition(".") for link in ports[0].links)
        if method in names
        for index, one in enumerate(names[method].outputs)
        if one.name == output
    ]
    if len(found) > 1:
        raise PipelineError(
            f"{NAME}: {ENCODER_STATES} is linked to {len(found)} outputs ({', '.join(ports[0].links)}); the rows can "
            "be written by one encoder only"
        )
    return found[0] if found else None


def _owners(
    model: Model, entries: Sequence[EntryPoint], log: MatchLog, *, written_by_encoder: bool
) -> dict[str, AttentionCall]:
    """Return the modules to route, each with its call; raises `PipelineError` where only a part of them can be."""
    calls = [(entry, call) for entry in entries for call in cross_attention_calls(model, entry)]
    if not calls:
        log.refused("the model", f"no attention has keys and values that follow {ENCODER_STATES} alone")
    owners = list(dict.fromkeys(call.owner for _, call in calls))
    repeatable = {entry.name: owner_calls(model, entry, owners) for entry in entries} if written_by_encoder else None
    taken: dict[str, AttentionCall] = {}
    refusals = []
    for owner in owners:
        own = [call for _, call in calls if call.owner == owner]
        reason = _refusal(model, entries, own)
        if reason is None and repeatable is not None and any(owner not in known for known in repeatable.values()):
            reason = f"is not called with {ENCODER_STATES} itself, so the encoder cannot compute its keys and values"
        if reason is None:
            taken[owner] = own[0]
        else:
            refusals.append(f"{owner or 'the model itself'} {reason}")
            log.refused(owner, reason)
    if refusals and taken:
        raise PipelineError(
            f"{NAME}: cross-attention is kept whole or not at all, and {refusals[0]}; describe the model otherwise or "
            "leave the pass out"
        )
    return taken


def _refusal(model: Model, entries: Sequence[EntryPoint], calls: Sequence[AttentionCall]) -> str | None:
    """Say why the calls that one module makes, over all of `entries`, cannot be cached, or None."""
    first = calls[0]
    if first.outside:
        return "calls attention outside the forward of any module; move it into one"
    if isinstance(model.module.get_submodule(first.owner), CrossAttention):
        return "keeps its encoder input already"
    if "forward" in vars(model.module.get_submodule(first.owner)):
        return "has a forward of its own instance"
    for entry in entries:
        made = calls_of_module(model, entry, first.owner)
        if made != 1 or sum(call.entry_point == entry.name for call in calls) != 1:
            return f"makes {made} attention calls in one {entry.name}; exactly one, to the encoder, can be kept"
    for call in calls:
        if call.causal:
            return "is causal (is_causal=True)"
        if call.dropout:
            return "uses dropout; put the model in evaluation mode"
        if call.key.shape[0] != 1:
            return f"runs on batch size {call.key.shape[0]}; the rows are for batch size 1"
        if (call.key.shape, call.value.shape) != (first.key.shape, first.value.shape):
            return "has keys of another shape in one entry point than in another"
    return None


def _port(entry: EntryPoint, name: str) -> TensorSignature:
    return next(port for port in entry.inputs if port.name == name)


# ---------------------------------------------------------------------------------------------------- entry points


def _choosing(entry: EntryPoint) -> EntryPoint:
    """Return `entry` with its encoder input left out where ``encoder_present`` is false."""

    def forward(module: nn.Module, *inputs: Tensor) -> Any:
        given = dict(zip((port.name for port in entry.inputs), inputs, strict=True))
        seen = _seen(module, given[ENCODER_PRESENT])
        with encoder_input(given[ENCODER_PRESENT]):
            return entry.forward(module, *{**given, ENCODER_PRESENT: seen}.values())

    return dataclasses.replace(entry, forward=forward)


def _reading(entry: EntryPoint) -> EntryPoint:
    """Return `entry` without encoder input: its cross-attention reads what was written."""
    states = _port(entry, ENCODER_STATES)
    shape = [dim for dim in states.shape if isinstance(dim, int)]
    left = tuple(port for port in entry.inputs if port.name not in (ENCODER_STATES, ENCODER_PRESENT))

    def forward(module: nn.Module, *inputs: Tensor) -> Any:
        given = dict(zip((port.name for port in left), inputs, strict=True))
        # Whatever used it would show as NaN; what cross-attention computes from it is dead code.
        given[ENCODER_STATES] = torch.full(shape, torch.nan, dtype=getattr(torch, states.dtype))
        given[ENCODER_PRESENT] = _seen(module, present=False)
        with encoder_input(present=False):
            return entry.forward(module, *(given[port.name] for port in entry.inputs))

    return dataclasses.replace(entry, forward=forward, inputs=left)


def _writing(producer: _Producer, calls: Mapping[str, OwnerCall]) -> EntryPoint:
    """Return the producer's entry point with the rows of `calls` written in the place of its output."""
    entry, position = producer.entry, producer.output

    def forward(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = list(_as_tuple(entry.forward(module, *inputs)))
        states = outputs.pop(position)
        with encoder_input(present=True, attends=False):
            for owner, call in calls.items():
                call.repeat(module.get_submodule(owner), states)
        _seen(module, present=True)
        # Not every serializer and engine takes a method without any output.
        return tuple(outputs or [torch.ones(1, dtype=torch.bool)])

    outputs = tuple(port for index, port in enumerate(entry.outputs) if index != position)
    return dataclasses.replace(entry, forward=forward, outputs=outputs or (OutputPort(ENCODER_PRESENT),))


def _seen(module: nn.Module, present: Presence) -> Tensor:
    """Record that a call brings an encoder input or brings none; return whether any did, where the model asks that."""
    state = dict(module.named_children()).get(ENCODER_INPUT_NAME)
    if state is None:
        return torch.ones(1, dtype=torch.bool)
    seen: Tensor = state(present)
    return seen


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


# ---------------------------------------------------------------------------------------------------- self-check


def _follows_presence(model: Model, entry: EntryPoint) -> bool:
    """True where the forward of `entry` does something else in a call that brings no encoder input."""
    runner, given = ModelRunner(model), example(model, entry)
    absent = {**given, ENCODER_PRESENT: torch.zeros_like(given[ENCODER_PRESENT])}
    return not _agree(runner.run(entry.name, **given), runner.run(entry.name, **absent))


def _check_same(before: Model, after: Model, entry: EntryPoint, producer: _Producer | None) -> None:
    """Raise `PipelineError` where `entry` of `after`, with state, computes something else than that of `before`."""
    old, new = ModelRunner(before), ModelRunner(after)
    none, some = torch.zeros(1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    first, later = example(before, entry, seed=3), example(before, entry, seed=4)
    garbage = {ENCODER_STATES: torch.full_like(first[ENCODER_STATES], torch.nan), ENCODER_PRESENT: none}
    without = [
        old.run(entry.name, **{**first, ENCODER_STATES: one[ENCODER_STATES], ENCODER_PRESENT: none})
        for one in (first, later)
    ]
    if _agree(*without):  # else the description gives a call before any encoder input no meaning
        _demand(without[0], new.run(entry.name, **{**first, **garbage}), entry, "before any encoder input came")
    if producer is not None:
        pixels = example(before, producer.entry, seed=3)
        name = producer.entry.outputs[producer.output].name
        first[ENCODER_STATES] = old.run(producer.entry.name, **pixels)[name]
        new.run(producer.entry.name, **pixels)
    wanted = old.run(entry.name, **first)
    _demand(wanted, new.run(entry.name, **first), entry, "with an encoder input")
    later = {**later, ENCODER_STATES: first[ENCODER_STATES], ENCODER_PRESENT: some}
    _demand(old.run(entry.name, **later), new.run(entry.name, **{**later, **garbage}), entry, "in a later call")


def _demand(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], entry: EntryPoint, when: str) -> None:
    if not _agree(wanted, got):
        raise PipelineError(
            f"{NAME}: {entry.name} computes something else {when}; it uses {ENCODER_STATES} elsewhere than as an "
            f"attention's keys and values, or does not follow {ENCODER_PRESENT}: describe the model otherwise"
        )


def _agree(wanted: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> bool:
    tolerance = DEFAULT_TOLERANCES["float32"].relative
    return all(
        bool(((value - got[name]).abs().max() <= tolerance * value.abs().max().clamp_min(1e-12)).all())
        for name, value in wanted.items()
    )
