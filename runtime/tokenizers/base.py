"""`Tokenizer`: the contract that every kind of tokenizer file keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence


class Tokenizer(ABC):
    """Text to token ids and back."""

    @abstractmethod
    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of `text`; special tokens written in it become their own ids.

        `bos` puts the beginning-of-sequence id before, `eos` the first end-of-sequence id behind.
        Raises `UsageError` where such an id is asked for and there is none.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`, without special tokens unless `skip_special` is off.

        Bytes that are no UTF-8 become U+FFFD. Raises `UsageError` on an id outside the vocabulary.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of ids, added tokens included."""

    @property
    @abstractmethod
    def bos_id(self) -> int | None:
        """The beginning-of-sequence id, None where there is none."""

    @property
    @abstractmethod
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a sequence."""

    @property
    @abstractmethod
    def adds_bos(self) -> bool:
        """Whether the file's own rules begin every text with `bos_id`, as its reference implementation does."""

    @property
    @abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """Special tokens and their ids."""

    @abstractmethod
    def token_to_id(self, token: str) -> int | None:
        """Return the id of one token, None where the vocabulary lacks it."""
