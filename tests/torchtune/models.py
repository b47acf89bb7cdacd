"""Small torchtune models with random weights."""

from typing import Any, Final

import torch
from torch import nn

from tests.torchtune.shim import torchtune
from triptych.compiler.adapters.torchtune import describe
from triptych.compiler.model import Model
from triptych.manifest import ImageSettings

CONTEXT: Final = 32
VOCABULARY: Final = 48
PLACEHOLDER: Final = VOCABULARY - 1
WIDTH: Final = 32
TILE: Final = 8
IMAGE: Final = ImageSettings(
    token="<|image|>",
    token_id=PLACEHOLDER,
    tokens=0,
    resize=(TILE, TILE),
    resample=2,
    crop=None,
    rescale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    suffix=(PLACEHOLDER,),
)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, gates and norms too: torchtune's gates start at 0, where nothing comes through."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1 + 0.3 * drawn)
    return module.eval()


def attention(*, kv_heads: int = 2, norms: bool = True) -> nn.Module:
    """Build torchtune's own attention as its cross-attention layers build it."""
    modules = torchtune("modules")
    head = WIDTH // 4
    extra = {"q_norm": modules.RMSNorm(dim=head), "k_norm": modules.RMSNorm(dim=head)} if norms else {}
    return randomized(
        modules.MultiHeadAttention(
            embed_dim=WIDTH,
            num_heads=4,
            num_kv_heads=kv_heads,
            head_dim=head,
            q_proj=nn.Linear(WIDTH, WIDTH, bias=False),
            k_proj=nn.Linear(WIDTH, kv_heads * head, bias=False),
            v_proj=nn.Linear(WIDTH, kv_heads * head, bias=False),
            output_proj=nn.Linear(WIDTH, WIDTH, bias=False),
            is_causal=False,
            **extra,
        )
    )


def llama3(layers: int = 2) -> Model:
    """A described llama3."""
    module = torchtune("models.llama3._component_builders").llama3(
        vocab_size=VOCABULARY,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=WIDTH,
        max_seq_len=CONTEXT,
        intermediate_dim=64,
    )
    return describe(randomized(module), eos_ids=(1,))


def deep_fusion_module(layers: int = 2) -> Any:
    """Build torchtune's CLIP encoder with its projection, fused into every second layer of a llama3."""
    builders = torchtune("models.llama3_2_vision._component_builders")
    vision = builders.llama3_2_vision_encoder(
        patch_size=4,
        num_heads=2,
        clip_embed_dim=16,
        clip_num_layers=1,
        clip_hidden_states=[0],
        num_layers_projection=1,
        decoder_embed_dim=WIDTH,
        tile_size=TILE,
        max_num_tiles=1,
    )
    decoder = builders.llama3_2_vision_decoder(
        vocab_size=VOCABULARY,
        num_layers=layers,
        fusion_interval=2,
        num_special_tokens=8,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=WIDTH,
        max_seq_len=CONTEXT,
        encoder_max_seq_len=16,
        intermediate_dim=64,
    )
    # The builder's own embedding selects tokens by a mask, and ExecuTorch cannot plan the memory of what it selects.
    decoder.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
    return randomized(torchtune("modules.model_fusion").DeepFusionModel(decoder, vision))


def deep_fusion(layers: int = 2) -> Model:
    """A described model that sees one tile of 8 by 8 pixels."""
    return describe(deep_fusion_module(layers), eos_ids=(1,), image=IMAGE, pixel_shape=(1, 3, TILE, TILE))
