"""Target ``coreml``: one ``.pte`` for Apple's CPU, GPU and Neural Engine, through ExecuTorch's Core ML delegate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from triptych.compiler.program import Program
from triptych.compiler.quantize.recipes import Recipe
from triptych.compiler.targets.pte_target import PteTarget, refuse_quantized
from triptych.errors import LoweringError


@dataclass(frozen=True)
class CoreML(PteTarget):
    """Linear algebra in Core ML delegates; attention and the KV cache stay on the CPU, where all methods share them.

    Lowering needs coremltools, on any platform; running needs macOS or iOS. `half` computes in float16 inside the
    delegates, which the Neural Engine asks for. Core ML shares no weights between methods whose partitions differ in
    number, so prefill and decode each carry their own. Its packages hold random identifiers and the date, so unlike
    those of other targets two artifacts made of equal inputs differ in bytes.
    """

    name: ClassVar[str] = "coreml"
    half: bool = False

    def pipeline(self) -> str:
        """Return the legalizing pipeline."""
        return "legalize-executorch"

    def check(self, recipe: Recipe) -> None:
        """Refuse quantized recipes: Core ML has no dynamically quantized activations."""
        refuse_quantized(
            self.name, recipe, "Core ML has no dynamic quantization for the layers", "recipe fp32, or target xnnpack"
        )

    def partitioner(self, program: Program) -> Any:
        """Return a partitioner that asks coremltools what it can convert; raises `LoweringError` without it."""
        try:
            import coremltools  # type: ignore[import-untyped]
            from executorch.backends.apple.coreml.compiler.coreml_preprocess import (
                MULTIMETHOD_WEIGHT_SHARING_STRATEGY,
                CoreMLBackend,
            )
            from executorch.backends.apple.coreml.partition.coreml_partitioner import (
                CoreMLPartitioner,
                _OperatorsSupportedForCoreMLBackend,
            )
        except ImportError as error:
            raise LoweringError(f"target coreml needs coremltools ({error}); pip install coremltools") from error
        from triptych.compiler.targets.partitioners import TensorPartitioner

        asked = _OperatorsSupportedForCoreMLBackend()

        def support(node: Node) -> str | None:
            return None if asked.is_node_supported({}, node) else "coremltools has no conversion for it"

        precision = coremltools.precision.FLOAT16 if self.half else coremltools.precision.FLOAT32
        specs = CoreMLBackend.generate_compile_specs(compute_precision=precision)
        specs.append(
            CoreMLBackend.generate_multimethod_weight_sharing_strategy_compile_spec(
                MULTIMETHOD_WEIGHT_SHARING_STRATEGY.DISABLED
            )
        )
        inner = CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=False)
        return TensorPartitioner(inner, support, symbolic_arguments=False)
