"""Rotary embeddings agree with transformers' for every scaling and layout, and on every engine."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.modules.engines import CHEAP, run_everywhere, together
from triptych.modules.rope import (
    LinearScaling,
    Llama3Scaling,
    RotaryEmbedding,
    Scaling,
    YarnScaling,
    attention_factor,
    inverse_frequencies,
    multimodal_axes,
    rotary_tables,
    rotate,
)

HEAD = 64
CONTEXT = 4096
SCALINGS: dict[str, tuple[Scaling | None, dict[str, Any]]] = {
    "linear": (LinearScaling(4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (
        Llama3Scaling(8.0, 8192),
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn": (
        YarnScaling(4.0, 2048),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
    ),
    "yarn, other bounds": (
        YarnScaling(16.0, 512, beta_fast=20.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.3, truncate=False),
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        },
    ),
    "yarn, given factor": (
        YarnScaling(2.0, 2048, attention_factor=1.5),
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "attention_factor": 1.5},
    ),
}


def config(**parameters: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_theta": 500_000.0, **parameters},
    )


@pytest.mark.parametrize(("scaling", "parameters"), SCALINGS.values(), ids=SCALINGS.keys())
def test_frequencies_are_those_of_transformers(scaling: Scaling, parameters: dict[str, Any]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config(**parameters), torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(HEAD, 500_000.0, scaling), wanted, rtol=2e-6, atol=0)
    assert attention_factor(scaling) == pytest.approx(factor)


@pytest.mark.parametrize("parameters", [{"rope_type": "default"}, SCALINGS["llama3"][1], SCALINGS["yarn"][1]])
def test_queries_turn_as_in_transformers(parameters: dict[str, Any]) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    scaling = {"default": None, "llama3": Llama3Scaling(8.0, 8192), "yarn": YarnScaling(4.0, 2048)}
    query, positions = torch.randn(1, 4, 9, HEAD), torch.arange(100, 109)
    cos, sin = LlamaRotaryEmbedding(config(**parameters))(query, positions.unsqueeze(0))
    wanted, _ = apply_rotary_pos_emb(query, query, cos, sin)
    module = RotaryEmbedding(256, HEAD, 500_000.0, scaling[parameters["rope_type"]])
    torch.testing.assert_close(module(query, positions), wanted, rtol=1e-4, atol=1e-4)


def test_sequence_first_is_heads_first_transposed() -> None:
    x, positions = torch.randn(2, 5, 3, HEAD), torch.tensor([4, 1, 9, 0, 30])
    wanted = RotaryEmbedding(32, HEAD)(x.transpose(1, 2), positions).transpose(1, 2)
    torch.testing.assert_close(RotaryEmbedding(32, HEAD, heads_first=False)(x, positions), wanted)


def test_neighbours_turn_as_complex_numbers() -> None:
    x, positions = torch.randn(1, 2, 6, HEAD), torch.arange(3, 9)
    angles = torch.outer(positions.float(), inverse_frequencies(HEAD))
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    wanted = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(RotaryEmbedding(16, HEAD, interleaved=True)(x, positions), wanted, rtol=1e-5, atol=1e-5)


def test_only_the_first_part_of_a_head_turns() -> None:
    x, positions = torch.randn(1, 2, 4, HEAD), torch.arange(2, 6)
    got = RotaryEmbedding(16, HEAD // 4)(x, positions)
    assert torch.equal(got[..., HEAD // 4 :], x[..., HEAD // 4 :])
    wanted = RotaryEmbedding(16, HEAD // 4)(x[..., : HEAD // 4], positions)
    torch.testing.assert_close(got[..., : HEAD // 4], wanted)
    assert not torch.equal(got, x)


def test_scores_depend_on_distances_alone() -> None:
    module = RotaryEmbedding(128, HEAD)
    query, key = torch.randn(1, 1, 1, HEAD), torch.randn(1, 1, 1, HEAD)
    scores = [(module(query, torch.tensor([p + 7])) * module(key, torch.tensor([p]))).sum() for p in (0, 50, 100)]
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-4)
    other = (module(query, torch.tensor([58])) * module(key, torch.tensor([50]))).sum()
    assert abs(other - scores[0]) > 1e-2


POSITIONS = torch.tensor([[3, 4, 5, 5, 5, 5, 8], [3, 4, 5, 5, 6, 6, 8], [3, 4, 5, 6, 5, 6, 8]])


def theirs_multimodal(family: str, sections: list[int], query: Tensor) -> Tensor:
    """Rotate `query` at `POSITIONS` with the classes of Qwen2-VL or Qwen3-VL."""
    if family == "qwen2_vl":
        from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig as Config
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding as Embedding
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb
    else:
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig as Config
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding as Embedding
        from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb
    settings = Config(
        hidden_size=4 * HEAD,
        num_attention_heads=4,
        head_dim=HEAD,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": sections},
    )
    cos, sin = Embedding(settings)(query, POSITIONS.unsqueeze(1))
    rotated: Tensor = apply_rotary_pos_emb(query, query, cos, sin)[0]
    return rotated


@pytest.mark.parametrize("interleaved", [False, True], ids=["qwen2_vl", "qwen3_vl"])
def test_three_rows_of_positions_turn_as_in_qwen(interleaved: bool) -> None:
    sections = [12, 10, 10] if interleaved else [8, 12, 12]
    query = torch.randn(1, 4, POSITIONS.shape[1], HEAD)
    wanted = theirs_multimodal("qwen3_vl" if interleaved else "qwen2_vl", sections, query)
    module = RotaryEmbedding(16, HEAD, sections=sections, interleaved_sections=interleaved)
    torch.testing.assert_close(module(query, POSITIONS), wanted, rtol=1e-5, atol=1e-5)


def test_time_height_and_width_take_turns_until_two_have_theirs() -> None:
    assert multimodal_axes([4, 2, 1]).tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert multimodal_axes([4, 2, 1], interleaved=True).tolist() == [0, 1, 2, 0, 1, 0, 0]


def test_equal_rows_of_positions_turn_as_one_row() -> None:
    x, positions = torch.randn(1, 2, 5, HEAD), torch.arange(9, 14)
    wanted = RotaryEmbedding(16, HEAD)(x, positions)
    for interleaved in (False, True):
        module = RotaryEmbedding(16, HEAD, sections=(12, 10, 10), interleaved_sections=interleaved)
        torch.testing.assert_close(module(x, positions.expand(3, 5)), wanted)


def test_tables_broadcast_in_rotate() -> None:
    cos, sin = rotary_tables(8, HEAD)
    x = torch.randn(8, HEAD)
    torch.testing.assert_close(rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1))


def test_planes_need_two_axes() -> None:
    with pytest.raises(ValueError, match="rotary_dim is 7, expected an even number"):
        inverse_frequencies(7)


def test_sections_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sections \[8, 8, 8\] have 24 planes, expected 32: half of rotary_dim"):
        RotaryEmbedding(16, HEAD, sections=[8, 8, 8])


def cases() -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    starts = ((0, 5), (5, 1), (40, 8))
    modules = [
        RotaryEmbedding(64, HEAD),
        RotaryEmbedding(64, HEAD, scaling=YarnScaling(4.0, 16), interleaved=True),
        RotaryEmbedding(64, HEAD // 2, scaling=Llama3Scaling(8.0, 16)),
    ]
    plain = [(one, [(torch.randn(1, 2, n, HEAD), torch.arange(s, s + n)) for s, n in starts]) for one in modules]
    sequence_first = (
        RotaryEmbedding(64, HEAD, heads_first=False),
        [(torch.randn(1, n, 2, HEAD), torch.arange(s, s + n)) for s, n in starts],
    )
    multimodal = (
        RotaryEmbedding(64, HEAD, sections=(12, 10, 10)),
        [(torch.randn(1, 2, n, HEAD), torch.randint(0, 64, (3, n))) for _, n in starts],
    )
    return together(*plain, sequence_first, multimodal)


@pytest.mark.parametrize(
    "engines", [CHEAP, pytest.param(("aotinductor",), marks=pytest.mark.slow)], ids=["cheap", "aotinductor"]
)
def test_every_engine_agrees_at_every_length(engines: tuple[str, ...]) -> None:
    run_everywhere(*cases(), engines=engines)
