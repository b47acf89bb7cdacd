"""Triptych: a compiler front end for multimodal PyTorch models.

`export` turns a model into an artifact with a vision encoder, a text prefill and a decode method over one
shared cache; `load` opens an artifact for running. Importing this package imports neither torch nor any
engine: names are resolved when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from triptych.errors import TriptychError

if TYPE_CHECKING:
    from triptych.api import export as export
    from triptych.api import load as load
    from triptych.compiler.artifact import Artifact as Artifact
    from triptych.compiler.model import EntryPoint as EntryPoint
    from triptych.compiler.model import Metadata as Metadata
    from triptych.compiler.model import Model as Model
    from triptych.compiler.stages import Captured as Captured
    from triptych.compiler.stages import Lowered as Lowered
    from triptych.compiler.stages import Source as Source
    from triptych.runtime.runner import MultimodalRunner as MultimodalRunner
    from triptych.runtime.runner import Runner as Runner
    from triptych.runtime.runner import TextRunner as TextRunner

__version__: Final = "0.1.0"

_LAZY: Final = {
    "export": "triptych.api",
    "load": "triptych.api",
    "Artifact": "triptych.compiler.artifact",
    "EntryPoint": "triptych.compiler.model",
    "Metadata": "triptych.compiler.model",
    "Model": "triptych.compiler.model",
    "Source": "triptych.compiler.stages",
    "Captured": "triptych.compiler.stages",
    "Lowered": "triptych.compiler.stages",
    "Runner": "triptych.runtime.runner",
    "TextRunner": "triptych.runtime.runner",
    "MultimodalRunner": "triptych.runtime.runner",
}

__all__ = [
    "Artifact",
    "Captured",
    "EntryPoint",
    "Lowered",
    "Metadata",
    "Model",
    "MultimodalRunner",
    "Runner",
    "Source",
    "TextRunner",
    "TriptychError",
    "__version__",
    "export",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'triptych' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
