"""Finding cross-attention: the attention calls whose keys and values come from an encoder's output and nothing else.

No class and no name of a model is looked at. An entry point says by two inputs that it takes such an output:
``encoder_states``, [1, T, D] for T positions of the encoder, and ``encoder_present``, bool [1], false in a call that
brings none. Which calls attend to it shows when the entry point runs on changed inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from triptych.compiler.attention import AttentionCall, recorded_attention
from triptych.compiler.capture import bound_forward
from triptych.compiler.model import EntryPoint, Model
from triptych.manifest import TensorSignature
from triptych.modules.cross_attention import CROSS_ATTENTION_NAME, ENCODER_INPUT_NAME

ENCODER_STATES: Final = "encoder_states"
ENCODER_PRESENT: Final = "encoder_present"

SEEN_ROW: Final = f"{ENCODER_INPUT_NAME}.seen"
"""The state row that says whether any encoder input came."""


@dataclass(frozen=True)
class OwnerCall:
    """How a module was called with the encoder's output as one of its arguments.

    `leaves` are the arguments as `spec` unflattens them to (args, kwargs), with None in the places of tensors;
    `shapes` gives the shape and dtype of those, and `states` the places that held the encoder's output.
    """

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    shapes: Mapping[int, tuple[torch.Size, torch.dtype]]
    states: tuple[int, ...]

    def repeat(self, owner: nn.Module, states: Tensor) -> None:
        """Call `owner` again on `states`, with zeros for every other tensor: its keys and values are the same."""
        leaves = list(self.leaves)
        for place, (shape, dtype) in self.shapes.items():
            leaves[place] = torch.zeros(shape, dtype=dtype)
        for place in self.states:
            leaves[place] = states
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        owner(*args, **kwargs)


def takes_encoder_states(entry: EntryPoint) -> bool:
    """True where `entry` declares both inputs of a call that may bring an encoder's output."""
    return {ENCODER_STATES, ENCODER_PRESENT} <= {port.name for port in entry.inputs}


def cross_attention_calls(model: Model, entry: EntryPoint) -> list[AttentionCall]:
    """Run `entry` three times and return the calls whose keys and values follow ``encoder_states`` alone.

    They stay the same, bit for bit, when every other input changes, and change when ``encoder_states`` does.
    """
    given = example(model, entry)
    others = {**example(model, entry, seed=1), ENCODER_STATES: given[ENCODER_STATES]}
    states = {**given, ENCODER_STATES: example(model, entry, seed=2)[ENCODER_STATES]}
    runs = [_recorded(model, entry, one) for one in (given, others, states)]
    if len({len(calls) for calls in runs}) != 1:
        return []
    return [
        call
        for call, with_others, with_states in zip(*runs, strict=True)
        if _same_memory(call, with_others) and not _same_memory(call, with_states)
    ]


def calls_of_module(model: Model, entry: EntryPoint, owner: str) -> int:
    """Return how many attention calls `owner` makes in one call of `entry`."""
    return sum(call.owner == owner for call in _recorded(model, entry, example(model, entry)))


def owner_calls(model: Model, entry: EntryPoint, owners: Sequence[str]) -> dict[str, OwnerCall]:
    """Run `entry` once and return how each of `owners` was called, where ``encoder_states`` itself was an argument."""
    given = example(model, entry)
    states = given[ENCODER_STATES]
    found: dict[str, OwnerCall] = {}

    def record(owner: str, args: Any, kwargs: Any) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = {place: leaf for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        places = tuple(place for place, leaf in tensors.items() if leaf is states)
        if places:
            found[owner] = OwnerCall(
                tuple(None if place in tensors else leaf for place, leaf in enumerate(leaves)),
                spec,
                {place: (leaf.shape, leaf.dtype) for place, leaf in tensors.items()},
                places,
            )

    handles = [
        model.module.get_submodule(owner).register_forward_pre_hook(
            lambda _, args, kwargs, owner=owner: record(owner, args, kwargs), with_kwargs=True
        )
        for owner in owners
    ]
    try:
        _recorded(model, entry, given)
    finally:
        for handle in handles:
            handle.remove()
    return found


def example(model: Model, entry: EntryPoint, seed: int = 0) -> dict[str, Tensor]:
    """Draw inputs by name; the call brings an encoder's output. Tokens are drawn from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def draw(port: TensorSignature, value: Tensor) -> Tensor:
        if port.name == ENCODER_PRESENT:
            return torch.ones_like(value)
        if value.dtype.is_floating_point:
            return torch.randn(value.shape, generator=generator).to(value.dtype)
        if "tokens" in port.links:
            return torch.randint(0, model.metadata.vocab_size, value.shape, generator=generator)
        return value

    values = entry.resolved(model.metadata.max_context).example_inputs()
    return {port.name: draw(port, value) for port, value in zip(entry.inputs, values, strict=True)}


def _recorded(model: Model, entry: EntryPoint, inputs: Mapping[str, Tensor]) -> list[AttentionCall]:
    with torch.no_grad(), recorded_attention(model.module, entry.name) as calls:
        bound_forward(model.module, entry)(*inputs.values())
    return calls


def _same_memory(one: AttentionCall, other: AttentionCall) -> bool:
    return torch.equal(one.key, other.key) and torch.equal(one.value, other.value)


# ---------------------------------------------------------------------------------------------------- state rows


def is_encoder_row(name: str) -> bool:
    """Return whether the state row called `name` holds keys or values of an encoder's output, or says if any came."""
    return CROSS_ATTENTION_NAME in name.split(".") or name == SEEN_ROW


def kept_encoder_rows(call: AttentionCall, images: int) -> dict[str, Tensor]:
    """Return what the rows of `call`'s module hold if it attends to the outputs of `images` calls of the encoder.

    They hold those of the last one.
    """
    prefix = f"{call.owner}.{CROSS_ATTENTION_NAME}.cache"
    length = call.key.shape[2] // max(images, 1)
    return {
        SEEN_ROW: torch.tensor([True]),
        f"{prefix}.keys": call.key.transpose(1, 2)[:, -length:],
        f"{prefix}.values": call.value.transpose(1, 2)[:, -length:],
    }
