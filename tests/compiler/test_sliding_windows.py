"""Models with sliding windows: found layer by layer, right over several windows, and wrong where the window is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from tests.compiler import tiny, windowed
from tests.compiler.test_attention import WINDOW as WINDOWED
from tests.compiler.test_attention import AdditiveWindow, Windowed
from tests.compiler.windowed import CONTEXT, LAYERS, WINDOW, random_model
from tests.compiler.wrong_windows import RingOneSlotOff, WindowOff, WindowOneLonger, WrongWindow
from triptych.compiler.adapters.hugging_face import describe
from triptych.compiler.attention import attention_calls
from triptych.compiler.capture import capture
from triptych.compiler.instruments import judge
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle, first_failure
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.stages import Source
from triptych.compiler.trace import Step
from triptych.compiler.trace_plans import TracePlan
from triptych.errors import ModelError, PipelineError

FIVE_AND_ONE = [WINDOW] * 5 + [None]
EVERY = [WINDOW] * LAYERS
FAMILIES: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "Gemma3": ({"query_pre_attn_scalar": 8}, FIVE_AND_ONE),
    "Mistral": ({}, EVERY),
    "Phi3": ({}, EVERY),
    "Starcoder2": ({}, EVERY),
    "Qwen2": ({"use_sliding_window": True, "max_window_layers": 2}, [None] * 2 + [WINDOW] * 4),
    "Qwen3": ({"use_sliding_window": True, "max_window_layers": 4}, [None] * 4 + [WINDOW] * 2),
    "Cohere2": ({}, [WINDOW, WINDOW, WINDOW, None, WINDOW, WINDOW]),
    "Olmo3": ({}, [WINDOW, WINDOW, WINDOW, None, WINDOW, WINDOW]),
    "Llama": ({}, [None] * LAYERS),
}


@pytest.fixture(scope="module")
def gemma3() -> Model:
    return windowed.gemma3()


@pytest.fixture(scope="module")
def gemma3_oracle(gemma3: Model) -> Oracle:
    return windowed.oracle(gemma3)


@pytest.fixture(scope="module")
def uncached(gemma3: Model) -> ProgramRunner:
    return ProgramRunner(capture(gemma3))


def windows(model: Model, entry_point: str) -> list[int | None]:
    calls = attention_calls(model, model.entry_points_with("prefill", "decode"))
    assert not any(call.masked for call in calls)
    return [call.window for call in calls if call.entry_point == entry_point]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_family_has_its_window(family: str) -> None:
    options, expected = FAMILIES[family]
    model = random_model(family, **options)
    assert windows(model, "prefill") == windows(model, "decode") == expected


@pytest.mark.parametrize("family", ["Mistral", "Phi3", "Qwen2", "Cohere2"])
def test_the_cached_model_of_a_family_is_the_eager_one(family: str) -> None:
    model = random_model(family, **FAMILIES[family][0])
    problem = first_failure(judge(windowed.oracle(model), Source(model).transform("static-kv-cache").model))
    assert problem is None, str(problem)


def test_a_window_that_the_context_never_fills_is_none() -> None:
    model = random_model("Mistral", sliding_window=CONTEXT)
    assert windows(model, "prefill") == [None] * LAYERS


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("Gemma2", {}, "Gemma2Attention uses softcap in its attention, which is not supported"),
        ("GptOss", {"num_local_experts": 2, "num_experts_per_tok": 1}, "GptOssAttention uses s_aux in its attention"),
    ],
)
def test_what_a_standard_attention_call_cannot_say_is_refused(
    family: str, options: dict[str, Any], reason: str
) -> None:
    model = random_model(family, **options)
    with pytest.raises(ModelError, match=reason):
        Source(model).transform("static-kv-cache")
    with pytest.raises(ModelError, match=reason):
        capture(model)


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        (
            "Llama4",
            {"attention_chunk_size": WINDOW, "num_local_experts": 2, "intermediate_size_mlp": 48},
            "lets query 8 attend to key 8, and query 63 to keys 56 to 63",
        ),
        (
            "Gemma3",
            {"use_bidirectional_attention": True, "query_pre_attn_scalar": 8},
            "lets query 0 attend to the later key 1",
        ),
    ],
)
def test_chunks_and_two_directions_are_no_windows(family: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        Source(random_model(family, **options)).transform("static-kv-cache")


def test_a_decoder_that_is_told_which_positions_are_an_images_is_refused(gemma3: Model) -> None:
    class Told(nn.Module):
        config = gemma3.module.config

        def forward(self, inputs_embeds: torch.Tensor, token_type_ids: torch.Tensor) -> None: ...

    sees_images = dataclasses.replace(windowed.TEXT_ONLY, pixel_shape=(1, 3, 8, 8))
    with pytest.raises(ModelError, match="gemma3_text takes token_type_ids: it masks or counts the positions"):
        describe(Told(), sees_images)


# ---------------------------------------------------------------------------------------------------- programs


def squares(program: Program) -> list[str]:
    """The tensors of prefill with two dimensions of the length of the input."""
    nodes = program.methods["prefill"].exported.graph.nodes
    shapes = {node.name: [str(size) for size in getattr(node.meta.get("val"), "shape", ())] for node in nodes}
    return [name for name, shape in shapes.items() if any(shape.count(size) > 1 for size in shape if size[0] == "s")]


def test_without_a_cache_the_mask_is_right_at_every_length(gemma3: Model, uncached: ProgramRunner) -> None:
    assert gemma3.eager is not None
    tokens = torch.randint(0, tiny.VOCABULARY, (CONTEXT,))
    for length in (1, WINDOW, WINDOW + 1, 3 * WINDOW, CONTEXT):
        wanted = gemma3.eager(gemma3.module, tokens[:length], ())
        embeds = uncached.run("token_embedding", tokens=tokens[None, :length])["embeds"]
        torch.testing.assert_close(embeds[0], wanted.token_embeds)
        logits = uncached.run("prefill", embeds=embeds, start_pos=torch.tensor([0]))["logits"]
        torch.testing.assert_close(logits[0], wanted.logits, rtol=1e-4, atol=1e-4)


def test_token_embeddings_are_scaled_once(gemma3: Model, uncached: ProgramRunner) -> None:
    """As the model itself gives them to its first layer."""
    module: Any = gemma3.module
    tokens = torch.tensor([[3, 1, 4]])
    with torch.no_grad():
        hidden = module(input_ids=tokens, output_hidden_states=True).hidden_states[0]
    embeds = uncached.run("token_embedding", tokens=tokens)["embeds"]
    torch.testing.assert_close(embeds, hidden)
    assert not torch.allclose(embeds, module.get_input_embeddings().weight[tokens])


def test_quantization_keeps_the_scale_of_the_embedding() -> None:
    model = random_model("Gemma3", query_pre_attn_scalar=8, head_dim=32, intermediate_size=64)
    quantized = Source(model).quantize("8da4w").model
    modules: list[Any] = [model.module, quantized.module]
    tokens = torch.arange(tiny.VOCABULARY)
    with torch.no_grad():
        exact, rounded = (module.get_input_embeddings()(tokens) for module in modules)
    assert 0 < float((exact - rounded).abs().max() / exact.abs().max()) < 0.01


@pytest.mark.parametrize("cache", ["static-kv-cache", "ring-kv-cache"])
def test_a_cached_program_is_the_eager_model_and_computes_no_mask_of_its_own(
    cache: str, gemma3: Model, gemma3_oracle: Oracle
) -> None:
    captured = Source(gemma3).transform(f"{cache},swap-sdpa").capture().rewrite("last-token-logits")
    assert not squares(captured.program), "what the routed call was given for a mask is dead"
    reports = list(judge(gemma3_oracle, captured.program))
    assert [report.failures + report.unseen for report in reports] == [()] * 2
    assert all(len(report.comparison.state) == 2 * LAYERS for report in reports)


@pytest.mark.parametrize(
    ("cache", "wrong"),
    [
        ("static-kv-cache", WindowOff()),
        ("static-kv-cache", WindowOneLonger()),
        ("ring-kv-cache", RingOneSlotOff()),
    ],
    ids=lambda one: getattr(one, "name", one),
)
def test_a_wrong_window_is_seen(cache: str, wrong: WrongWindow, gemma3: Model, gemma3_oracle: Oracle) -> None:
    source = Source(gemma3).transform(cache).transform(wrong)
    assert len(source.results[-1].matches) == 5
    problem = first_failure(judge(gemma3_oracle, source.model))
    assert problem is not None
    assert "relative" in problem.reason


# ---------------------------------------------------------------------------------------------------- hand-written


def hand_written_oracle(model: Model) -> Oracle:
    steps = (Step("prefill", 3), Step("prefill", WINDOWED + 3), Step("decode", 6))
    return Oracle(model, [TracePlan("hand-written", steps, lambda seed: windowed.random_tokens(WINDOWED + 12, seed))])


@pytest.mark.parametrize("attention", [Windowed, AdditiveWindow])
@pytest.mark.parametrize("cache", ["static-kv-cache", "ring-kv-cache"])
def test_a_hand_written_window_is_kept(cache: str, attention: type[nn.Module]) -> None:
    model = tiny.tiny(attention(), tiny.TinyAttention())
    program = Source(model).transform(f"{cache},swap-sdpa").capture().program
    assert not squares(program)
    problem = first_failure(judge(hand_written_oracle(model), program))
    assert problem is None, str(problem)


@pytest.mark.parametrize(("cache", "wrong"), [("static-kv-cache", WindowOff()), ("ring-kv-cache", RingOneSlotOff())])
def test_a_hand_written_window_that_is_lost_is_seen(cache: str, wrong: WrongWindow) -> None:
    model = tiny.tiny(Windowed(), tiny.TinyAttention())
    assert first_failure(judge(hand_written_oracle(model), Source(model).transform(cache).transform(wrong).model))
