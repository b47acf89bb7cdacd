"""Tokenizers in Hugging Face's ``tokenizer.json``, run by the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from triptych.errors import UsageError
from triptych.runtime.tokenizers.base import Tokenizer


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json``.

    That file names neither BOS nor EOS. They are the arguments, else what ``tokenizer_config.json`` beside it
    says, else (BOS only) what the file's post-processor puts before a text.
    """

    def __init__(self, path: Path, *, bos_id: int | None = None, eos_ids: tuple[int, ...] = ()) -> None:
        """Load `path`; raises `UsageError` where the library cannot read it."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UsageError(f"{path} is no tokenizer the library reads: {error}; fetch the file again") from error
        # A file may record truncation or padding of its training; a prompt must be neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {token.content: id_ for id_, token in added.items() if token.special}
        self._vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        config = _config_beside(path)
        template = self._tokenizer.encode("", add_special_tokens=True).ids
        named_bos = self._id_of(config.get("bos_token"))
        begins = template[0] if template and template[0] != self._id_of(config.get("eos_token")) else None
        self._bos_id = next((id_ for id_ in (bos_id, named_bos, begins) if id_ is not None), None)
        named_eos = self._id_of(config.get("eos_token"))
        self._eos_ids = eos_ids or (() if named_eos is None else (named_eos,))
        self._adds_bos = self._bos_id is not None and begins == self._bos_id

    def _id_of(self, token: Any) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return self.token_to_id(content) if isinstance(content, str) else None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`; see `Tokenizer.encode`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        if bos:
            if self._bos_id is None:
                raise UsageError("this tokenizer has no BOS token; encode without bos or name its id")
            ids = [self._bos_id, *ids]
        if eos:
            if not self._eos_ids:
                raise UsageError("this tokenizer has no EOS token; encode without eos or name its id")
            ids = [*ids, self._eos_ids[0]]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`; see `Tokenizer.decode`."""
        for id_ in ids:
            if id_ < 0 or self._tokenizer.id_to_token(id_) is None:
                raise UsageError(f"token id {id_} is not in the vocabulary of {self._vocab_size}")
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    @property
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""
        return self._vocab_size

    @property
    def bos_id(self) -> int | None:
        """The BOS id, None where nothing names one."""
        return self._bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The EOS ids, empty where nothing names one."""
        return self._eos_ids

    @property
    def adds_bos(self) -> bool:
        """Whether the file's post-processor begins every text with `bos_id`."""
        return self._adds_bos

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The added tokens marked special, with their ids."""
        return self._special

    def token_to_id(self, token: str) -> int | None:
        """Return the id of one token, None where the vocabulary lacks it."""
        id_: int | None = self._tokenizer.token_to_id(token)
        return id_


def _config_beside(path: Path) -> dict[str, Any]:
    config = path.parent / "tokenizer_config.json"
    if not config.is_file():
        return {}
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{config} is damaged ({error}); fetch the file again or remove it") from error
    return data if isinstance(data, dict) else {}
