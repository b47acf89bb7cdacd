"""Tokenizers, usable alone and without torch: `load_tokenizer` tells a file's kind by its content."""

from __future__ import annotations

from pathlib import Path

from triptych.errors import UsageError
from triptych.runtime.tokenizers.base import Tokenizer
from triptych.runtime.tokenizers.hugging_face import HuggingFaceTokenizer
from triptych.runtime.tokenizers.kinds import tokenizer_kind
from triptych.runtime.tokenizers.stream import TextStream

__all__ = ["HuggingFaceTokenizer", "TextStream", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: Path, *, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()) -> Tokenizer:
    """Load the tokenizer in the file `path`, of the kind that its content shows.

    `bos_id` and `eos_ids` replace what the file and its neighbours say. Raises `UsageError` where the file is
    missing or of no known kind.
    """
    kind = tokenizer_kind(path)
    if kind == "hugging-face":
        return HuggingFaceTokenizer(path, bos_id=bos_id, eos_ids=eos_ids)
    raise UsageError(f"{path} holds no known tokenizer; expected a Hugging Face tokenizer.json")
