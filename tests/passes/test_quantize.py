"""`quantize` touches the layers its recipe names, names the one it cannot take, and leaves the user's module alone."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.compiler import tiny
from triptych.compiler.stages import Source
from triptych.errors import RecipeError, TriptychError

LINEARS_A_LAYER = 4


def quantized_weights(module: nn.Module) -> set[str]:
    """Modules that hold an integer tensor."""
    return {
        name.rpartition(".")[0].split(".parametrizations")[0]
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if not tensor.dtype.is_floating_point and "position" not in name
    }


def test_the_linears_of_the_decoder_the_head_and_the_embedding_are_quantized() -> None:
    source = Source(tiny.tiny()).quantize("8da4w")
    layers = {
        f"blocks.{layer}.{name}" for layer in range(2) for name in ("attention.qkv", "attention.out", "up", "down")
    }
    assert {match.where for match in source.results[0].matches} == {*layers, "head", "embedding"}
    assert quantized_weights(source.model.module) == {*layers, "head", "embedding"}


def test_what_no_component_names_stays_as_it_is() -> None:
    model = tiny.tiny()
    changed = Source(model).quantize("8da4w").model.module
    assert changed.get_parameter("positions.weight") is model.module.get_parameter("positions.weight")


def test_the_embedded_models_vision_tower_and_projector_stay_in_fp32(demo_model: Any) -> None:
    source = Source(demo_model).quantize("8da4w")
    matches = source.results[0].matches
    assert len(matches) == 4 * 7 + 2, "seven linears a layer, the head and the embedding"
    assert not [match for match in matches if "vision" in match.where or "projector" in match.where]
    before = dict(demo_model.module.named_parameters())
    after = dict(source.model.module.named_parameters())
    kept = [name for name in before if "vision" in name or "projector" in name]
    assert kept
    assert all(after[name] is before[name] for name in kept)


def test_a_tied_embedding_is_untied_and_the_users_stays_tied() -> None:
    model = tiny.tiny()
    program = Source(model).quantize("8da4w").transform("static-kv-cache").capture().program
    embedding = [weight for weight in program.weights.values() if weight.key.startswith("embedding")]
    head = [weight for weight in program.weights.values() if weight.key.startswith("head")]
    assert embedding
    assert head
    assert {weight.users for weight in embedding} == {("decode", "token_embedding")}
    assert {weight.users for weight in head} == {("decode", "prefill")}
    module = model.module
    assert module.get_parameter("head.weight") is module.get_parameter("embedding.weight")


def test_the_users_weights_are_not_rounded() -> None:
    model = tiny.tiny()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    Source(model).quantize("8da4w")
    torch.testing.assert_close(dict(model.module.state_dict()), before, rtol=0, atol=0)


def test_rounding_moves_the_logits_a_little() -> None:
    tokens = torch.randint(0, tiny.VOCABULARY, (1, 9))
    model = tiny.tiny()
    with torch.no_grad():
        wanted = model.module(tokens)
        got = Source(model).quantize("8da4w").model.module(tokens)
    error = float((got - wanted).abs().max() / wanted.abs().max())
    assert 1e-4 < error < 0.3, "4-bit weights change the result, and only so far"


def test_four_bits_are_stored_as_sixteen_levels_in_groups_of_32() -> None:
    module = Source(tiny.tiny()).quantize("8da4w").model.module
    stored = {
        name: tensor
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if name.startswith("blocks.0.down.")
    }
    (values,) = [
        tensor for tensor in stored.values() if not tensor.dtype.is_floating_point and tuple(tensor.shape) == (32, 64)
    ]
    assert int(values.min()) >= -8
    assert int(values.max()) <= 7
    scales = [tensor for tensor in stored.values() if tensor.dtype.is_floating_point]
    assert any(scale.numel() == 32 * 64 // 32 for scale in scales)


def test_a_layer_that_does_not_divide_into_groups_is_named_before_any_work() -> None:
    heard: list[str] = []
    source = Source(tiny.tiny(width=40), report=heard.append)
    with pytest.raises(RecipeError, match=r"layer blocks\.0\.attention\.qkv: its 40 inputs .*group size 32; use fp32"):
        source.quantize("8da4w")
    assert not heard


def test_one_odd_layer_leaves_all_others_untouched() -> None:
    model = tiny.tiny(layers=1)
    model.module.get_submodule("blocks.0").register_module("extra", nn.Linear(33, 4))
    with pytest.raises(RecipeError, match=r"layer blocks\.0\.extra: its 33 inputs"):
        Source(model).transform("quantize{recipe=8da4w}")
    assert quantized_weights(model.module) == set()


def test_an_unknown_recipe_is_named_beside_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="no recipe is called '3bit'; known: fp32, 8da4w"):
        Source(tiny.tiny(layers=1)).transform("quantize{recipe=3bit}")


def test_the_float_recipe_changes_nothing() -> None:
    source = Source(tiny.tiny(layers=1))
    assert source.quantize("fp32") is source


def test_a_model_description_without_components_is_refused() -> None:
    from dataclasses import replace

    model = tiny.tiny(layers=1)
    bare = replace(model, metadata=replace(model.metadata, components={}))
    with pytest.raises(RecipeError, match="names none; use fp32"):
        Source(bare).quantize("8da4w")


def test_quantizing_twice_is_refused() -> None:
    with pytest.raises(TriptychError):
        Source(tiny.tiny(layers=1)).quantize("8da4w").quantize("8da4w")
