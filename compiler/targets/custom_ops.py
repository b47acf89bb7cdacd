"""Loading ExecuTorch's custom operators into torch's registry."""

from __future__ import annotations

import contextlib
import io
import warnings

from triptych.errors import LoweringError


def register_llama_operators() -> None:
    """Register ``torch.ops.llama.*`` and the quantized kernels; raises `LoweringError` without executorch."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            import executorch.extension.llm.custom_ops.custom_ops
            import executorch.kernels.quantized  # noqa: F401
    except ImportError as error:
        raise LoweringError(f"this target needs executorch ({error}); install triptych[executorch]") from error
