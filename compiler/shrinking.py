"""Smaller models and shorter conversations, to look for what is wrong where there is least to look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from triptych.compiler.model import Model
from triptych.compiler.trace import CallTrace, Step
from triptych.compiler.trace_plans import TracePlan

LAYERS: Final = "layers"
"""The entry of a model's provenance that says to how many layers its stacks were cut."""


def stacks(model: Model) -> dict[str, nn.ModuleList]:
    """Return the stacks of repeated blocks by name: lists of modules of one class that lie in no other list."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len({type(block) for block in module}) == 1 and not inside:
            found[name] = module
    return found


def cut_stacks(model: Model, layers: int) -> Model:
    """Return `model` with at most the first `layers` blocks of every stack; tensors are shared, the rest is a copy.

    A module whose configuration counts the blocks (``config.num_hidden_layers``, as Hugging Face models have it)
    gets the new count. The result's provenance says how far it was cut.
    """
    own = model.with_own_modules()
    for name, stack in stacks(own).items():
        parent_name, _, attribute = name.rpartition(".")
        parent = own.module.get_submodule(parent_name)
        setattr(parent, attribute, stack[:layers])
        config: Any = getattr(parent, "config", None)
        if getattr(config, "num_hidden_layers", None) == len(stack):
            config.num_hidden_layers = min(layers, len(stack))
    kept = {name for name, _ in own.module.named_modules()}
    metadata = dataclasses.replace(
        own.metadata,
        components={
            part: tuple(name for name in names if name in kept) for part, names in own.metadata.components.items()
        },
        provenance={**own.metadata.provenance, LAYERS: str(layers)},
    )
    return dataclasses.replace(own, metadata=metadata)


def beginning(trace: CallTrace, length: int) -> CallTrace | None:
    """Return the first `length` positions of `trace`, prefilled at once; None where that would split an image."""
    tokens = trace.tokens[:length]
    images = 0
    if trace.pixel_values:
        rows = int(torch.eq(trace.tokens, trace.image_token_id or 0).sum()) // len(trace.pixel_values)
        images, rest = divmod(int(torch.eq(tokens, trace.image_token_id or 0).sum()), rows)
        if rest:
            return None
    name = f"the first {length} positions of '{trace.name}'"
    return dataclasses.replace(
        trace, name=name, tokens=tokens, steps=(Step("prefill", length),), pixel_values=trace.pixel_values[:images]
    )


def in_few_steps(trace: CallTrace) -> Iterator[CallTrace]:
    """Yield `trace` prefilled at once, with its last position decoded, and with its last position prefilled apart."""
    length = len(trace.tokens)
    yield dataclasses.replace(trace, steps=(Step("prefill", length),))
    if length > 1 and int(trace.tokens[-1]) != trace.image_token_id:
        for kind in ("decode", "prefill"):
            yield dataclasses.replace(trace, steps=(Step("prefill", length - 1), Step(kind, 1)))


def plan_of(trace: CallTrace) -> TracePlan:
    """Return the plan that draws this very trace."""
    return TracePlan(trace.name, trace.steps, lambda _: trace.tokens, trace.pixel_values, trace.image_token_id)
