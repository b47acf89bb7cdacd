"""Finding the attention calls of a model, by running its entry points and watching.

Passes that replace attention ask here which module makes which ``scaled_dot_product_attention`` call. No
class and no name of a model is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from triptych.compiler.capture import bound_forward
from triptych.compiler.model import EntryPoint, Model


@dataclass(frozen=True)
class AttentionCall:
    """One call: the module whose forward made it, and what it was given ([B, H, S, D] tensors)."""

    owner: str
    entry_point: str
    query: Tensor
    key: Tensor
    value: Tensor
    masked: bool
    causal: bool
    dropout: bool


class AttentionRecorder(TorchFunctionMode):
    """Records the attention calls made under it, each with the innermost module of `module` then running."""

    def __init__(self, module: nn.Module, entry_point: str) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []
        self._entry_point = entry_point
        self._module = module
        self._running: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> AttentionRecorder:
        for name, module in self._module.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entered(name)))
            self._handles.append(module.register_forward_hook(self._left, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def _entered(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any) -> None:
            self._running.append(name)

        return hook

    def _left(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self._record(*args, **(kwargs or {}))
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
        owner = self._running[-1] if self._running else ""
        self.calls.append(
            AttentionCall(
                owner, self._entry_point, query, key, value, attn_mask is not None, is_causal, dropout_p != 0.0
            )
        )


def attention_calls(model: Model, entries: Iterable[EntryPoint]) -> list[AttentionCall]:
    """Run each of `entries` once on its example inputs and return the calls made, in order."""
    found: list[AttentionCall] = []
    for entry in entries:
        with torch.no_grad(), AttentionRecorder(model.module, entry.name) as recorder:
            bound_forward(model.module, entry)(*entry.example_inputs())
        found += recorder.calls
    return found
