"""A model before capture: an ordinary module, the entry points that describe it, and what is known of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from triptych.compiler.roles import Role
from triptych.errors import ModelError
from triptych.manifest import ABI, ChatSettings, DynamicDim, ImageSettings, TensorSignature

CONTEXT: Final = -1
"""Stands for "the context length" as the maximum of a dynamic dimension; capture puts the number in."""


@dataclass(frozen=True)
class OutputPort:
    """The name of an output and who takes it; shape and dtype come from capture."""

    name: str
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class EntryPoint:
    """One method to capture, described and not changed.

    `forward(module, *inputs)` runs the module the way this entry point means; it returns one tensor or a
    tuple, in the order of `outputs`. An input called ``start_pos`` (int64 [1]) is announced to caches below.
    Example inputs are drawn from the signatures; `examples` overrides them by name.
    """

    name: str
    roles: frozenset[Role]
    forward: Callable[..., Any]
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[OutputPort, ...]
    examples: Mapping[str, Tensor] = field(default_factory=dict)

    def resolved(self, max_context: int) -> EntryPoint:
        """Return this entry point with `CONTEXT` bounds replaced by `max_context`."""

        def resolve(dim: int | DynamicDim) -> int | DynamicDim:
            if isinstance(dim, DynamicDim) and dim.maximum == CONTEXT:
                return max_context if dim.minimum == max_context else dataclasses.replace(dim, maximum=max_context)
            return dim

        inputs = tuple(
            dataclasses.replace(port, shape=tuple(resolve(dim) for dim in port.shape)) for port in self.inputs
        )
        return dataclasses.replace(self, inputs=inputs)

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Draw one example a port: dynamic dimensions at 8 (or their maximum), integers zero, floats random."""
        generator = torch.Generator().manual_seed(0)

        def draw(port: TensorSignature) -> Tensor:
            if port.name in self.examples:
                return self.examples[port.name]
            sizes = [dim if isinstance(dim, int) else min(dim.maximum, max(dim.minimum, 8)) for dim in port.shape]
            dtype = getattr(torch, port.dtype)
            if dtype.is_floating_point:
                return torch.randn(sizes, generator=generator).to(dtype)
            return torch.zeros(sizes, dtype=dtype)

        return tuple(draw(port) for port in self.inputs)


@dataclass(frozen=True)
class Metadata:
    """What is known of a model beside its methods.

    `max_context` is the length the program is built for, in positions; `model_max_context` what the model
    allows. `components` names parts of the module ("vision", "projector", "embedding", "decoder", "lm_head")
    by the fully qualified names of the modules they consist of; recipes speak of them. `abi` is the contract that the
    methods keep. `special_ids` are tokens with a meaning of their own (those of a chat template, placeholders), and
    `kept_tokens` the ids that the methods can take and give (`triptych.manifest.token_ids`), None for all.
    """

    max_context: int
    model_max_context: int
    vocab_size: int
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    image: ImageSettings | None = None
    chat: ChatSettings = field(default_factory=lambda: ChatSettings(template=None))
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    abi: str = ABI
    special_ids: tuple[int, ...] = ()
    kept_tokens: str | None = None


@dataclass(frozen=True)
class EagerOutputs:
    """What the user's model gives for one whole sequence.

    `logits` is [S, V]; `image_embeds` one [T, D] an image; `token_embeds` [S, D] of the text embedding alone.
    `state` gives the final values of state rows of the model's own, by name; KV caches need no entry, their
    keys and values are read off the attention calls.
    """

    logits: Tensor
    image_embeds: tuple[Tensor, ...]
    token_embeds: Tensor
    state: Mapping[str, Tensor] = field(default_factory=dict)


EagerForward = Callable[[nn.Module, Tensor, tuple[Tensor, ...]], EagerOutputs]
"""The user's own forward: (module, tokens int64 [S], pixel_values of each image) → outputs, no cache, no pass."""


@dataclass(frozen=True)
class Model:
    """A described model. `eager` is the reference of parity; `tokenizer_file` travels into artifacts."""

    module: nn.Module
    entry_points: tuple[EntryPoint, ...]
    metadata: Metadata
    eager: EagerForward | None = None
    tokenizer_file: Path | None = None

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.entry_points]
        if not names or len(set(names)) != len(names):
            raise ModelError(f"entry points are {names}; expected at least one, each name once")

    def entry_points_with(self, *kinds: str) -> tuple[EntryPoint, ...]:
        """Return the entry points that have a role of one of `kinds`, with their bounds resolved."""
        return tuple(
            entry.resolved(self.metadata.max_context)
            for entry in self.entry_points
            if any(role.kind in kinds for role in entry.roles)
        )

    def with_own_modules(self) -> Model:
        """Return this model over a copy of the module tree that shares every parameter and buffer.

        Source transforms change the copy; the user's module stays as it was.
        """
        shared = [*self.module.parameters(), *self.module.buffers()]
        memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
        return dataclasses.replace(self, module=copy.deepcopy(self.module, memo))
