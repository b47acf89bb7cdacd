"""Text of a token sequence while it grows."""

from __future__ import annotations

from triptych.runtime.tokenizers.base import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream:
    """Decodes ids one at a time and never splits a UTF-8 character.

    All pieces together equal the text of all ids decoded at once. A token's text may depend on the one before
    it (a leading space, half a character), so each step decodes a short window: the tokens whose text was given
    last, as context, and those still held back.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        """Decode with `tokenizer`, leaving special tokens out unless `skip_special` is off."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Add one id and return the text that is now complete, possibly none."""
        self._held.append(token)
        text = self._held_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._held = self._held, []
        return text

    def flush(self) -> str:
        """Return the text held back, bytes of an unfinished character as U+FFFD, and start afresh."""
        text = self._held_text()
        self._context, self._held = [], []
        return text

    def _held_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special) if ids else ""
