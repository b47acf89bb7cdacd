"""`triptych.runtime`: from an artifact to generated text.

Names load on first use, so importing this package imports neither torch nor an engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

if not __name__.startswith("triptych."):
    raise ImportError(
        f"import this package as 'triptych.runtime', not as {__name__!r}: a second copy would register twice"
    )

_EXPORTS: Final = {
    "Capabilities": "method_runner",
    "ChatMessage": "chat",
    "CompositeRunner": "composite",
    "FakeRunner": "fake",
    "GenerationResult": "generation",
    "GenerationStream": "runner",
    "HuggingFaceTokenizer": "tokenizers",
    "ImagePrefiller": "image_prefill",
    "ImageSegment": "segments",
    "MethodRunner": "method_runner",
    "MultimodalRunner": "runner",
    "Prompt": "segments",
    "Runner": "runner",
    "Sampler": "sampling",
    "Session": "session",
    "TextDecoder": "generation",
    "TextPrefiller": "prefill",
    "TextRunner": "runner",
    "TextSegment": "segments",
    "TextTokenGenerator": "generation",
    "Timings": "timings",
    "Tokenizer": "tokenizers",
    "load_runner": "loaders",
    "load_tokenizer": "tokenizers",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605 (a table gives the names)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
