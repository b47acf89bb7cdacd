"""The tiny model with a tokenizer, so that runners which speak text can run it."""

import dataclasses
from pathlib import Path
from typing import Final

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.compiler import tiny
from triptych.compiler.model import Model

LETTERS: Final = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRST"
SPECIAL: Final = ("<s>", "</s>")
EOS_IDS: Final = (1, 36)
"""Of these the tokenizer knows the first as special; it names neither as the end of text."""


def tiny_text_model(folder: Path) -> Model:
    """Return the tiny model; its tokenizer has one token a letter and lies in `folder`."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *LETTERS))}
    assert len(vocabulary) == tiny.VOCABULARY
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    model = tiny.tiny(tied=False)  # tied, it would repeat the last letter
    metadata = dataclasses.replace(model.metadata, eos_ids=EOS_IDS, bos_id=0)
    return dataclasses.replace(model, metadata=metadata, tokenizer_file=folder / "tokenizer.json")


def tokens_of(model: Model, text: str) -> list[int]:
    """Return the tokens of `text` by the library that made the model's tokenizer."""
    ids: list[int] = Tokenizer.from_file(str(model.tokenizer_file)).encode(text).ids
    return ids


def greedy(model: Model, tokens: list[int]) -> list[int]:
    """Return the most likely tokens one after another, from the eager model over whole sequences.

    They end with an end of text, or where the context is full.
    """
    generated: list[int] = []
    while len(tokens) + len(generated) < model.metadata.max_context and not {*EOS_IDS} & {*generated}:
        with torch.no_grad():
            logits = model.module(torch.tensor([tokens + generated]))
        generated.append(int(logits[0, -1].argmax()))
    return generated
