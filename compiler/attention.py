"""Finding the attention calls of a model, by running its entry points and watching.

Passes that replace attention ask here which module makes which ``scaled_dot_product_attention`` call. No
class and no name of a model is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from triptych.compiler.capture import bound_forward
from triptych.compiler.model import EntryPoint, Model
from triptych.modules.routing import enter_multi_head_attention


@dataclass(frozen=True)
class AttentionCall:
    """One call: the module whose forward made it, and what it was given ([B, H, S, D] tensors).

    `outside` marks a call made in no module's forward.
    """

    owner: str
    entry_point: str
    query: Tensor
    key: Tensor
    value: Tensor
    masked: bool
    causal: bool
    dropout: bool
    outside: bool = False


class _AttentionWatch(TorchFunctionMode):
    def __init__(self, entry_point: str) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self.running: list[str] = []
        self._entry_point = entry_point

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._record(*args, **(kwargs or {}))
        elif func is F.multi_head_attention_forward:
            return enter_multi_head_attention(self, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _record(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> None:
        owner = self.running[-1] if self.running else ""
        self.calls.append(
            AttentionCall(
                owner,
                self._entry_point,
                query,
                key,
                value,
                attn_mask is not None,
                is_causal,
                dropout_p != 0.0,
                outside=not self.running,
            )
        )


@contextmanager
def recorded_attention(module: nn.Module, entry_point: str = "") -> Iterator[list[AttentionCall]]:
    """Record the attention calls made inside, each with the innermost child of `module` then running.

    State that `module` keeps in buffers is written in copies, which are gone at the end.
    """
    watch = _AttentionWatch(entry_point)

    def left(*_: object) -> None:
        watch.running.pop()

    handles: list[RemovableHandle] = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_, name=name: watch.running.append(name)))
        handles.append(child.register_forward_hook(left, always_call=True))
    own = [(child, name, buffer) for child in module.modules() for name, buffer in child.named_buffers(recurse=False)]
    copies = {id(buffer): buffer.clone() for _, _, buffer in own}
    for child, name, buffer in own:
        child._buffers[name] = copies[id(buffer)]
    try:
        with watch:
            yield watch.calls
    finally:
        for handle in handles:
            handle.remove()
        for child, name, buffer in own:
            child._buffers[name] = buffer


def attention_calls(model: Model, entries: Iterable[EntryPoint]) -> list[AttentionCall]:
    """Run each of `entries` once on its example inputs and return the calls made, in order."""
    found: list[AttentionCall] = []
    for entry in entries:
        with torch.no_grad(), recorded_attention(model.module, entry.name) as calls:
            bound_forward(model.module, entry)(*entry.example_inputs())
        found += calls
    return found
