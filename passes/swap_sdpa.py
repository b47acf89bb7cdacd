"""``swap-sdpa``: cached attention spelled in aten becomes one neutral operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.attention import attention_calls
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import MatchLog, SourceTransform
from triptych.compiler.properties import KV_CACHE, Property
from triptych.modules.attention import AtenKernels, CachedAttention, OperatorKernels
from triptych.modules.routing import routed_handler


@dataclass(frozen=True)
class SwapSDPA(SourceTransform):
    """Let each target choose the kernel of cached attention.

    1. Where a module's attention goes through a cache, its arithmetic becomes one operator: ``triptych::cached_sdpa``
       over a static cache, ``triptych::ring_sdpa`` over a ring, ``triptych::quantized_cached_sdpa`` over int8. A
       target legalizes it to its best kernel (``llama::custom_sdpa`` on ExecuTorch).
    2. Attention without a cache keeps its aten call, which every target lowers already.
    """

    name: ClassVar[str] = "swap-sdpa"
    requires: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})
    uniform: ClassVar[bool] = True
    after: ClassVar[frozenset[str]] = frozenset({"static-kv-cache", "ring-kv-cache", "sink-kv-cache"})

    def transform(self, model: Model, log: MatchLog) -> Model:
        """Swap the kernel of every cached attention."""
        for name, module in model.module.named_modules():
            handler = routed_handler(module)
            if not isinstance(handler, CachedAttention):
                continue
            if not isinstance(handler.kernel, AtenKernels):
                log.refused(name, f"its kernel is {type(handler.kernel).__name__} already")
            elif log.match(name):
                handler.kernel = OperatorKernels()
        encoders = model.entry_points_with("encoder")
        for owner in dict.fromkeys(call.owner for call in attention_calls(model, encoders)):
            log.refused(owner, "attends without a cache; the aten call stays")
        return model
