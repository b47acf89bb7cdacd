"""Sending the ``scaled_dot_product_attention`` call of a standard module to a module of ours.

Nothing about the owner is assumed but that its forward calls ``torch.nn.functional``'s function: the call is
caught by a `TorchFunctionMode` while the owner's forward runs. The handler is registered as a child, so its
buffers are ordinary state of the model, and copying the model copies the route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

HANDLER_NAME: Final = "routed_attention"


def enter_multi_head_attention(mode: TorchFunctionMode, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run the body of ``multi_head_attention_forward`` under `mode`.

    The function hands itself whole to an active mode, and would do so again; for the time of this call it is told
    that nobody is there, so that the ``scaled_dot_product_attention`` inside it reaches `mode`.
    """
    functional: Any = F
    asks_first = functional.has_torch_function
    functional.has_torch_function = lambda _: False
    try:
        with mode:
            return F.multi_head_attention_forward(*args, **kwargs)
    finally:
        functional.has_torch_function = asks_first


class _AttentionRoute(TorchFunctionMode):
    def __init__(self, handler: nn.Module) -> None:
        super().__init__()
        self._handler = handler

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._handler(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return enter_multi_head_attention(self, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _RoutedForward:
    """The owner's forward under a route; an object and no closure, so that deep copies rebind to the copy."""

    def __init__(self, owner: nn.Module, name: str) -> None:
        self.owner = owner
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _AttentionRoute(self.owner.get_submodule(self.name)):
            return type(self.owner).forward(self.owner, *args, **kwargs)


def route_attention(owner: nn.Module, handler: nn.Module, name: str = HANDLER_NAME) -> None:
    """Send the attention call inside `owner`'s forward to `handler`, a child called `name`, from now on.

    Raises `ValueError` where `owner` already has a route or a forward of its own instance.
    """
    if "forward" in vars(owner) or name in dict(owner.named_children()):
        raise ValueError(f"{type(owner).__name__} already has a replaced forward; route a module once")
    owner.add_module(name, handler)
    owner.forward = _RoutedForward(owner, name)


def routed_handler(owner: nn.Module) -> nn.Module | None:
    """Return the handler that `owner`'s attention is routed to, or None."""
    return dict(owner.named_children()).get(HANDLER_NAME)
