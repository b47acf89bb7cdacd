"""Partitioners of ExecuTorch's wheel that cannot lower where only the wheel is installed, and what each asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

MISSING_SDK: Final[Mapping[str, str]] = {
    "cuda": "Triton and CUDA's compiler, on a machine with an NVIDIA GPU",
    "ethos-u": "Arm's TOSA tools and the Vela compiler, pip install 'executorch[ethos-u]'",
    "mediatek": "MediaTek's NeuroPilot SDK (mtk_converter, mtk_neuron), from neuropilot.mediatek.com",
    "metal": "macOS, with torchao's Metal kernels built from source",
    "mlx": "macOS on Apple silicon and an ExecuTorch built from source: the wheel lacks the delegate's generated files",
    "mps": "static lengths, which prefill has not, and macOS; ExecuTorch gives it up in favour of target coreml",
    "nxp": "NXP's eIQ Neutron SDK, by examples/nxp/setup.sh of ExecuTorch's sources",
    "openvino": "the package openvino, pip install 'executorch[openvino]'",
    "qualcomm": "Qualcomm's AI Engine Direct SDK (QNN) with QNN_SDK_ROOT set, and pip install py-cpuinfo",
    "samsung": "Samsung's Exynos AI LiteCore SDK and an ExecuTorch built from source with it",
    "vgf": "Arm's ML SDK for Vulkan, pip install 'executorch[vgf]'",
}
"""Name of a partitioner → what lowering through it takes."""


def refusal(name: str, known: str) -> str | None:
    """Return why there is no target called `name`, where that is one of these partitioners; `known` are the targets."""
    if name not in MISSING_SDK:
        return None
    return (
        f"target {name} is not built in: ExecuTorch's partitioner of that name needs {MISSING_SDK[name]}; use one of "
        f"{known}, or install a package that offers it under the entry point triptych.targets"
    )
