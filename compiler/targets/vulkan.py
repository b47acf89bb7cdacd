"""Target ``vulkan``: one ``.pte`` for GPUs of phones and desktops, through ExecuTorch's Vulkan delegate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from triptych.compiler.program import Program
from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.targets.pte_target import PteTarget, refuse_quantized


@dataclass(frozen=True)
class Vulkan(PteTarget):
    """Linear algebra in Vulkan delegates; attention and the KV cache stay on the CPU, where all methods share them.

    Lowering needs no SDK. Running needs a runtime built with the Vulkan back end (``EXECUTORCH_BUILD_VULKAN``), which
    ExecuTorch's wheel is not; its Android packages are. `half` stores and computes in float16 inside the delegates.
    """

    name: ClassVar[str] = "vulkan"
    half: bool = False

    def pipeline(self) -> str:
        """Return the legalizing pipeline."""
        return "legalize-executorch"

    def check(self, recipe: Recipe) -> None:
        """Refuse quantized recipes."""
        refuse_quantized(
            self.name, recipe, "the delegate is given no quantized linear layers", "recipe fp32, or target xnnpack"
        )

    def partitioner(self, program: Program) -> Any:
        """Return a partitioner that leaves outside what cannot change its size from call to call."""
        from executorch.backends.vulkan.partitioner.vulkan_partitioner import (
            VulkanPartitioner,
            VulkanSupportedOperators,
        )
        from executorch.backends.vulkan.utils import DEFAULT_BUFFER_LIMIT, DEFAULT_TEXTURE_LIMITS

        from triptych.compiler.targets.partitioners import TensorPartitioner

        class Asked(VulkanSupportedOperators):  # type: ignore[misc]  # executorch has no types
            reason = ""

            def log_skip(self, node: Node, reason: str) -> None:
                self.reason = reason

        asked = Asked(DEFAULT_TEXTURE_LIMITS, DEFAULT_BUFFER_LIMIT, require_dynamic_shape=True)

        def support(node: Node) -> str | None:
            return None if asked.is_node_supported({}, node) else f"Vulkan: {asked.reason}"

        inner = VulkanPartitioner({"require_dynamic_shapes": True, "force_fp16": self.half})
        return TensorPartitioner(inner, support, symbolic_arguments=True)
