"""`adopt-abi` makes the methods that ExecuTorch's runners call, and refuses what these runners cannot drive."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler.abi import constant_methods
from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import EntryPoint, Model, OutputPort
from triptych.compiler.pass_kinds import MatchLog
from triptych.compiler.program import Program
from triptych.compiler.roles import PREFILL, Role, encoder
from triptych.compiler.stages import Captured
from triptych.errors import ModelError, PipelineError, VerificationError
from triptych.manifest import DynamicDim, TensorSignature
from triptych.passes.adopt_abi import AdoptABI
from triptych.testing import check_pass, default_model

ADOPT = AdoptABI("executorch-llm")
IMAGE_ENCODER = encoder("image")
TINY_WITH_CACHE = "static-kv-cache,swap-sdpa,capture,last-token-logits"


def ports(program: Program) -> dict[str, tuple[list[str], list[str]]]:
    return {
        name: ([port.name for port in method.inputs], [port.name for port in method.outputs])
        for name, method in program.methods.items()
    }


def stored_bytes(program: Program) -> int:
    return sum(weight.nbytes for weight in program.weights.values())


# ---------------------------------------------------------------------------------------------------- what it makes


FORMS = (TINY_WITH_CACHE, f"quantize{{recipe=8da4w}},{TINY_WITH_CACHE}", f"{TINY_WITH_CACHE},merge-token-embedding")


@pytest.mark.parametrize("after", FORMS, ids=["fp32", "8da4w", "merged"])
def test_a_text_model_becomes_one_method(after: str) -> None:
    check = check_pass(ADOPT, tiny.tiny(), after=after, matches=1)
    before, program = check.before, check.after
    assert isinstance(before, Program)
    assert isinstance(program, Program)
    assert ports(program) == {"forward": (["tokens", "start_pos"], ["logits"])}
    (method,) = program.methods.values()
    assert {str(role) for role in method.roles} == {"prefill", "decode"}
    assert [port.shape for port in method.inputs] == [(1, DynamicDim("S", 1, tiny.CONTEXT_LENGTH)), (1,)]
    assert [port.shape for port in method.outputs] == [(1, tiny.VOCABULARY)]
    assert stored_bytes(program) == stored_bytes(before), "no weight is copied"
    assert all(one.comparison.outputs and one.comparison.state for one in check.traces)


def test_a_model_with_images_keeps_three_methods() -> None:
    check = check_pass(ADOPT, default_model(), after=TINY_WITH_CACHE, matches=1)
    before, program = check.before, check.after
    assert isinstance(before, Program)
    assert isinstance(program, Program)
    assert ports(program) == {
        "vision_encoder": (["pixel_values"], ["embeds"]),
        "token_embedding": (["tokens"], ["embeds"]),
        "text_decoder": (["embeds", "start_pos"], ["logits"]),
    }
    settings, metadata = program.metadata.image, program.metadata
    assert settings is not None
    embeds, content = program.methods["vision_encoder"].outputs[0], program.methods["text_decoder"].inputs[0]
    assert embeds.shape == (1, settings.tokens, 128)
    assert content.shape == (1, DynamicDim("S", 1, metadata.max_context), 128)
    assert content.links == ("token_embedding.embeds", "vision_encoder.embeds")
    assert stored_bytes(program) == stored_bytes(before)
    assert {one.trace for one in check.traces} >= {"one image", "two images", "image in a later turn"}


def test_the_program_tells_the_runner_what_it_is() -> None:
    captured = tiny.captured().rewrite("last-token-logits")
    assert constant_methods(captured.program) == {}
    program = captured.rewrite(ADOPT).program
    told = {
        "get_max_seq_len": 24,
        "get_max_context_len": 24,
        "get_vocab_size": 48,
        "get_eos_ids": [1],
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
        "use_sdpa_with_kv_cache": False,
    }
    assert constant_methods(program) == told
    lowered = captured.rewrite(ADOPT).rewrite("legalize-executorch").program
    assert constant_methods(lowered) == {**told, "use_sdpa_with_kv_cache": True}
    named = replace(program, metadata=replace(program.metadata, bos_id=3, eos_ids=()))
    assert {**told, "get_bos_id": 3} == {**constant_methods(named), "get_eos_ids": [1]}


def test_a_program_for_one_token_a_call_says_so() -> None:
    tokens = TensorSignature("tokens", "int64", (1, 1), ("tokens",))
    embeds = TensorSignature("embeds", "float32", (1, 1, tiny.WIDTH), ("token_embedding.embeds",))
    single = tiny.with_entry_point(tiny.tiny(), "prefill", inputs=(embeds, tiny.START_POS))
    single = tiny.with_entry_point(single, "token_embedding", inputs=(tokens,))
    told = constant_methods(tiny.captured(single).rewrite(ADOPT).program)
    assert (told["get_max_seq_len"], told["get_max_context_len"], told["enable_dynamic_shape"]) == (1, 24, False)


# ---------------------------------------------------------------------------------------------------- what it must not


class IgnoresThePosition(AdoptABI):
    """A wrong variant: every call begins at position 0."""

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        adopted = super().rewrite(program, log)
        editor = GraphEditor(adopted.methods["forward"].exported, self.name)
        start = editor.input("start_pos")
        with editor.graph.inserting_after(editor.last_placeholder):
            zero = editor.call(torch.ops.aten.mul.Scalar, start, 0)
        start.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)
        return adopted.with_exported({"forward": editor.finish()})


def test_the_oracle_catches_a_decoder_that_forgets_where_it_is() -> None:
    with pytest.raises(VerificationError, match="adopt-abi"):
        check_pass(IgnoresThePosition("executorch-llm"), tiny.tiny(), after=TINY_WITH_CACHE, matches=1)


def test_lowering_sees_that_one_method_goes_on_from_itself() -> None:
    captured = tiny.captured().rewrite("last-token-logits")
    captured.rewrite(ADOPT).lower("eager")
    with pytest.raises(ModelError, match="decode does not go on from prefill"):
        captured.rewrite(IgnoresThePosition("executorch-llm")).lower("eager")


class Seeing(tiny.TinyModel):
    """The tiny model with an encoder for pictures of 4 by 4 pixels and a memory that calls may share."""

    def __init__(self) -> None:
        super().__init__(tiny.TinyBlock(tiny.TinyAttention()))
        self.look = nn.Linear(16, tiny.WIDTH, bias=False)
        self.register_buffer("memory", torch.zeros(3, tiny.WIDTH))


def see(module: Any, pixel_values: Tensor) -> Tensor:
    """[1, 3, 4, 4] → [3, width]."""
    seen: Tensor = module.look(pixel_values.reshape(-1, 16))
    return seen


def see_and_keep(module: Any, pixel_values: Tensor) -> Tensor:
    """Write what was seen into the memory, too."""
    seen = see(module, pixel_values)
    module.memory.copy_(seen)
    return seen


def with_encoder(
    forward: Callable[..., Tensor] = see,
    shape: tuple[int, ...] = (1, 3, 4, 4),
    role: Role = IMAGE_ENCODER,
    name: str = "pixel_values",
) -> Model:
    """Return a described model with images."""
    torch.manual_seed(0)
    model = tiny.describe(Seeing().eval())
    pixels = TensorSignature(name, "float32", shape, ("image",))
    eye = EntryPoint("eye", frozenset({role}), forward, (pixels,), (OutputPort("embeds", ("prefill.embeds",)),))
    prefill = next(entry for entry in model.entry_points if entry.name == "prefill")
    embeds = replace(prefill.inputs[0], links=(*prefill.inputs[0].links, "eye.embeds"))
    changed = tiny.with_entry_point(model, "prefill", inputs=(embeds, *prefill.inputs[1:]))
    return replace(changed, entry_points=(eye, *changed.entry_points))


def with_position_ids() -> Model:
    """Return a text model whose prefill is told each position."""
    prefill = next(entry for entry in tiny.entry_points() if entry.name == "prefill")
    positions = TensorSignature("position_ids", "int64", (1, tiny.SEQUENCE))

    def forward(module: Any, embeds: Tensor, _: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = module.logits(embeds, position_ids[0])
        return logits

    return tiny.with_entry_point(tiny.tiny(), "prefill", forward=forward, inputs=(*prefill.inputs, positions))


def with_two_outputs() -> Model:
    """Return a text model whose prefill gives the embeddings back, too."""

    def forward(module: Any, embeds: Tensor, start_pos: Tensor) -> tuple[Tensor, Tensor]:
        return tiny.prefill(module, embeds, start_pos), embeds * 1.0

    outputs = (OutputPort("logits", ("sampler",)), OutputPort("hidden"))
    return tiny.with_entry_point(tiny.tiny(), "prefill", forward=forward, outputs=outputs)


def reads_memory(model: Model) -> Model:
    """Return the model with a prefill that adds what the encoder has kept."""

    def forward(module: Any, embeds: Tensor, start_pos: Tensor) -> Tensor:
        return tiny.prefill(module, embeds + module.memory.mean(), start_pos)

    return tiny.with_entry_point(model, "prefill", forward=forward)


def with_two_prefills() -> Model:
    """Return a text model with a second prefill."""
    model = tiny.tiny()
    prefill = next(entry for entry in model.entry_points if entry.name == "prefill")
    return replace(
        model, entry_points=(*model.entry_points, replace(prefill, name="other", roles=frozenset({PREFILL})))
    )


REFUSED: dict[str, tuple[Callable[[], Model], str]] = {
    "shared state": (lambda: reads_memory(with_encoder(see_and_keep)), "eye, prefill share the state memory"),
    "two images a call": (lambda: with_encoder(shape=(2, 3, 4, 4)), r"eye takes pixel_values \[2, 3, 4, 4\]"),
    "patches": (lambda: with_encoder(shape=(3, 16)), r"eye takes pixel_values \[3, 16\]; the runners give one image"),
    "audio": (
        lambda: with_encoder(role=encoder("audio"), name="samples"),
        "eye takes samples; the runners expect pixel",
    ),
    "position ids": (
        with_position_ids,
        "prefill takes embeds, start_pos, position_ids; the runners expect embeds, start",
    ),
    "two outputs": (with_two_outputs, "prefill gives logits, hidden; the runners expect logits"),
    "two prefills": (with_two_prefills, r"2 methods have the role prefill \(prefill, other\); expected exactly one"),
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_runners_cannot_drive_is_refused(model: Callable[[], Model], reason: str) -> None:
    captured: Captured = tiny.captured(model())
    with pytest.raises(PipelineError, match=f"adopt-abi matched nothing: the program: {reason}"):
        captured.rewrite(ADOPT)


def test_an_encoder_without_state_is_taken() -> None:
    program = tiny.captured(with_encoder()).rewrite(ADOPT).program
    assert program.methods["vision_encoder"].outputs[0].shape == (1, 3, tiny.WIDTH)
    pixels = torch.randn(1, 3, 4, 4)
    with torch.no_grad():
        (embeds,) = (program.methods["vision_encoder"].exported.module()(pixels),)
        expected = see(with_encoder().module, pixels)
    torch.testing.assert_close(embeds, expected.unsqueeze(0))


def test_it_is_adopted_once_and_over_a_cache() -> None:
    with pytest.raises(PipelineError, match="it keeps the ABI executorch-llm/1 already"):
        tiny.captured().rewrite([ADOPT, ADOPT])
    with pytest.raises(PipelineError, match="adopt-abi requires kv-cache"):
        tiny.captured(passes="").rewrite(ADOPT)
    captured = tiny.captured()
    kept = replace(captured.program.metadata, kept_tokens="0-7")
    with pytest.raises(PipelineError, match="it takes some tokens of the vocabulary only"):
        replace(captured, program=replace(captured.program, metadata=kept)).rewrite(ADOPT)
    with pytest.raises(PipelineError, match="option 'abi' of adopt-abi is 'gguf'; expected executorch-llm"):
        tiny.captured().rewrite("adopt-abi{abi=gguf}")
