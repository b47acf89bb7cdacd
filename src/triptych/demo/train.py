"""Train the embedded default model from nothing, on the CPU.

``python -m triptych.demo.train --out DIR`` draws an endless stream of dialogues over training layouts,
trains a LLaVA of about one million parameters, and saves it as a plain Hugging Face checkpoint. Needs the
extra ``hf``. The recipe (linear maps initialized at 1/sqrt(fan_in), AdamW, cosine) is in the model card.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any, Final

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from triptych.demo.dialogues import Turn, dialogue
from triptych.demo.scenes import render

IMAGE_SIZE: Final = 32
PATCH_SIZE: Final = 8
IMAGE_TOKENS: Final = (IMAGE_SIZE // PATCH_SIZE) ** 2
RENDER_SIZES: Final = (32, 48, 64, 128, 256)
IGNORED_LABEL: Final = -100

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}user: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% else %} assistant: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """Train the byte-level BPE on dialogues over training layouts."""
    rng = random.Random(seed)
    lines = [f"user: {turn.text} assistant: {turn.answer}" for _ in range(4000) for turn in dialogue(rng, test=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<pad>", "<s>", "</s>", "<image>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def build_processor(tokenizer: Tokenizer) -> Any:
    """Wrap `tokenizer` and a 32 x 32 image processor as a ``LlavaProcessor``."""
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=wrapped,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(vocab_size: int, image_token_id: int, seed: int) -> Any:
    """Build the untrained model; linear and patch weights are drawn at 1/sqrt(fan_in)."""
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            vision_use_head=False,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
            initializer_range=0.08,
        ),
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return model


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a special token; raises `ValueError` where the tokenizer does not know it."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}")
    return int(found)


def encode_dialogue(tokenizer: Tokenizer, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Return token ids with expanded image placeholders, and labels that cover the answers only."""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    image_id, bos_id, eos_id = (token_id(tokenizer, token) for token in ("<image>", "<s>", "</s>"))
    tokens = [bos_id]
    labels = [IGNORED_LABEL]
    for turn in turns:
        # As the chat template's text is tokenized: only a placeholder cuts it before the question.
        if turn.images:
            question = encode("user: ") + [image_id] * IMAGE_TOKENS * len(turn.images)
            question += encode(f"{turn.text} assistant:")
        else:
            question = encode(f"user: {turn.text} assistant:")
        answer = [*encode(f" {turn.answer}"), eos_id]
        tokens += question + answer
        labels += [IGNORED_LABEL] * len(question) + answer
    return tokens, labels


class Batches:
    """Draws training batches, reproducibly from `seed`."""

    def __init__(self, processor: Any, tokenizer: Tokenizer, size: int, seed: int) -> None:
        self._processor = processor
        self._tokenizer = tokenizer
        self._size = size
        self._rng = random.Random(seed)

    def draw(self) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask``, ``labels`` [B, S] and ``pixel_values`` [N, 3, 32, 32]."""
        rows: list[tuple[list[int], list[int]]] = []
        pictures: list[Image.Image] = []
        for _ in range(self._size):
            turns = dialogue(self._rng, test=False)
            rows.append(encode_dialogue(self._tokenizer, turns))
            pictures += [
                render(scene, self._rng, size=self._rng.choice(RENDER_SIZES)) for turn in turns for scene in turn.images
            ]
        length = max(len(tokens) for tokens, _ in rows)
        pixels = self._processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]

        def padded(values: list[int], filler: int) -> list[int]:
            return values + [filler] * (length - len(values))

        return {
            "input_ids": torch.tensor([padded(tokens, 0) for tokens, _ in rows]),
            "labels": torch.tensor([padded(labels, IGNORED_LABEL) for _, labels in rows]),
            "attention_mask": torch.tensor([padded([1] * len(tokens), 0) for tokens, _ in rows]),
            "pixel_values": pixels,
        }


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 40, floor: float = 0.03) -> float:
    """Linear warm-up, then cosine from `peak` to `floor` x `peak`."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / warm_up) * (cosine * (1 - floor) + floor)


def train(out: Path, *, steps: int, batch_size: int, peak: float, seed: int, init: Path | None) -> None:
    """Train for `steps` batches, from `init` or from nothing; save the checkpoint and the processor to `out`."""
    tokenizer = train_tokenizer()
    processor = build_processor(tokenizer)
    model = build_model(tokenizer.get_vocab_size(), token_id(tokenizer, "<image>"), seed)
    if init is not None:
        model.load_state_dict(type(model).from_pretrained(init, dtype=torch.float32).state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    batches = Batches(processor, tokenizer, batch_size, seed)
    started = time.monotonic()
    smoothed = 0.0
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        batch = batches.draw()
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        if step % 50 == 49:
            elapsed = time.monotonic() - started
            print(f"step {step + 1}/{steps} loss {smoothed:.4f} {elapsed / (step + 1):.2f} s/step", flush=True)
        if step % 500 == 499 or step == steps - 1:
            model.save_pretrained(out)
            processor.save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded default model.")
    parser.add_argument("--out", type=Path, required=True, help="folder that receives the checkpoint")
    parser.add_argument("--steps", type=int, default=5000, help="number of batches (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="dialogues a batch (default: %(default)s)")
    parser.add_argument("--peak-learning-rate", type=float, default=1.5e-3, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default: %(default)s)")
    parser.add_argument("--init", type=Path, default=None, help="checkpoint to go on from (default: none)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(
        options.out,
        steps=options.steps,
        batch_size=options.batch_size,
        peak=options.peak_learning_rate,
        seed=options.seed,
        init=options.init,
    )


if __name__ == "__main__":
    main()
