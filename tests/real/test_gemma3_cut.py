"""Six layers of Gemma-3-270M: what was kept of it, and the tied, scaled embedding of a quantized export."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.assets import _layer_of
from tests.real.gemma3 import WINDOW, judged, text_plan
from triptych.compiler.adapters.hugging_face import load
from triptych.compiler.oracle import Oracle
from triptych.compiler.quantize.recipes import component_of
from triptych.compiler.stages import Source

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

PROMPT, DECODED = WINDOW + 68, 4
CONTEXT = PROMPT + DECODED


def test_cut_keeps_a_layer_of_each_kind(gemma3_cut: Path) -> None:
    config = json.loads((gemma3_cut / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert config["sliding_window"] == WINDOW
    assert {"tokenizer.json", "GEMMA_TERMS.html"} <= {path.name for path in gemma3_cut.iterdir()}
    with safe_open(gemma3_cut / "model.safetensors", framework="pt") as tensors:
        assert {_layer_of(name) for name in tensors.keys()} == {-1, *range(6)}  # noqa: SIM118
        assert tensors.get_slice("model.embed_tokens.weight").get_shape() == [262144, 640]


def test_components_name_the_tied_embedding_and_the_projection(gemma3_cut: Path) -> None:
    model = load(gemma3_cut, max_context=CONTEXT)
    assert component_of(model, "model.embed_tokens") == "embedding"
    assert component_of(model, "lm_head") == "lm_head"
    assert component_of(model, "model.layers.5.self_attn.q_proj") == "decoder"
    assert model.module.get_parameter("lm_head.weight") is model.module.get_parameter("model.embed_tokens.weight")


def test_parity_in_8da4w_over_more_than_a_window(gemma3_cut: Path, tmp_path: Path) -> None:
    quantized = Source(load(gemma3_cut, max_context=CONTEXT)).quantize("8da4w")
    oracle = Oracle(quantized.model, [text_plan(quantized.model, PROMPT, DECODED)], recipe="8da4w", quantized=True)
    report = judged(oracle, quantized.transform("ring-kv-cache"), "eager", tmp_path / "artifact")
    assert report.failures + report.unseen == ()
    assert len(report.comparison.kls) == 1 + DECODED
