"""A text model small enough to export often: a random Llama with a tokenizer of its own, as a local checkpoint."""

import json
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CONTEXT: Final = 64
CORPUS: Final = ("a red circle and a blue square", "one two three", "the quick brown fox jumps over the lazy dog")
SPECIAL: Final = ("<s>", "</s>", "<|turn|>")
TEMPLATE: Final = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"


def write_checkpoint(folder: Path) -> Path:
    """Write the checkpoint into `folder` and return it; the tokens after a prompt differ from one to the next."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def ids_of(folder: Path, text: str) -> list[int]:
    """Return the tokens of a prompt in the chat template."""
    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(f"<|turn|>{text}").ids
    return ids
