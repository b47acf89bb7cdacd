"""Small random models of Hugging Face families whose attention has sliding windows."""

from __future__ import annotations

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from tests.compiler import tiny
from triptych.compiler.adapters.hugging_face import describe
from triptych.compiler.adapters.hugging_face_assets import Assets
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.trace import Step
from triptych.compiler.trace_plans import TracePlan
from triptych.manifest import ChatSettings

WINDOW: Final = 8
CONTEXT: Final = 64
LAYERS: Final = 6
TEXT_ONLY: Final = Assets(None, None, (), ChatSettings(None), None, None, None)
SIZES: Final = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    # Large enough that what attention sees decides the logits.
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_model(family: str, **options: Any) -> Model:
    """Return a described random model of a family, such as "Gemma3"; `options` go to its configuration."""
    import transformers

    text = "Text" if hasattr(transformers, f"{family}TextConfig") else ""
    config = getattr(transformers, f"{family}{text}Config")(**{**SIZES, **options})
    torch.manual_seed(0)
    module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    return describe(module, TEXT_ONLY, max_context=CONTEXT)


def gemma3() -> Model:
    """Return a small Gemma 3: five sliding layers and a full one."""
    return random_model("Gemma3", query_pre_attn_scalar=8)


def random_tokens(length: int, seed: int) -> Tensor:
    """Return token ids int64 [length]; the vocabulary is that of the tiny model."""
    return torch.randint(0, tiny.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def oracle(model: Model) -> Oracle:
    """Return an oracle over conversations that are several windows long.

    Where every layer has a window, the first token reaches no further than LAYERS * (WINDOW - 1) positions.
    """
    long = (Step("prefill", 3 * WINDOW), Step("decode", WINDOW + 3))
    turns = (Step("prefill", 3), Step("prefill", 2 * WINDOW + 1), Step("decode", 3), Step("prefill", WINDOW))
    return Oracle(
        model,
        [
            TracePlan(name, steps, partial(random_tokens, sum(step.count for step in steps)))
            for name, steps in (("long", long), ("turns", turns))
        ],
    )
