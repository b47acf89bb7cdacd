"""Which kind of tokenizer a file holds, read from its content alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from triptych.errors import UsageError


def tokenizer_kind(path: Path) -> Literal["hugging-face"] | None:
    """Return the kind of tokenizer in `path`, None where it is of no known kind; raises `UsageError` if unreadable."""
    if not path.is_file():
        raise UsageError(f"no tokenizer at {path}: there is no such file; check the path")
    with path.open("rb") as stream:
        if stream.read(64).lstrip()[:1] != b"{":
            return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(
            f"{path} is damaged: it begins like JSON and is none ({error}); fetch the file again"
        ) from error
    model = data.get("model") if isinstance(data, dict) else None
    return "hugging-face" if isinstance(model, dict) and "vocab" in model else None
