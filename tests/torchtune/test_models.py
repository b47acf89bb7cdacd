"""Whole torchtune models hold parity with themselves: on the program, on the eager target and on XNNPACK."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.torchtune import models
from tests.torchtune.shim import torchtune
from triptych.compiler.adapters.torchtune import describe
from triptych.compiler.artifact import Artifact
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.stages import Captured, Source
from triptych.compiler.targets.pte import read_pte
from triptych.compiler.trace_plans import make_plans, subject_of
from triptych.errors import ModelError
from triptych.runtime.entry_points import EntryPoints
from triptych.runtime.image_prefill import ImagePrefiller
from triptych.runtime.loaders import load_runner
from triptych.runtime.prefill import TextPrefiller
from triptych.runtime.segments import ImageSegment, Prompt, TextSegment
from triptych.runtime.session import Session
from triptych.runtime.timings import Timings

PASSES = {"llama3": "static-kv-cache,swap-sdpa", "deep_fusion": "cond-attention,static-kv-cache,swap-sdpa"}
IMAGE_TRACES = {"image, second turn", "image in a later turn", "another image"}
CROSS = "decoder.layers.1.fusion_layer.attn.cross_attention.cache"
SEEN = "encoder_input_state.seen"


@pytest.fixture(scope="module", params=PASSES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture(scope="module")
def subjects() -> dict[str, tuple[Model, Oracle, Captured]]:
    made = {}
    for kind, passes in PASSES.items():
        model: Model = getattr(models, kind)()
        oracle = Oracle(model, make_plans(subject_of(model), 4, (1, 9)))
        captured = Source(model).transform(passes).capture().rewrite("last-token-logits")
        made[kind] = (model, oracle, captured)
    return made


@pytest.fixture(scope="module")
def artifacts(subjects: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("torchtune")
    return {kind: captured.lower("xnnpack").save(folder / kind) for kind, (*_, captured) in subjects.items()}


def judge(oracle: Oracle, runner: Any, methods: Mapping[str, str]) -> set[str]:
    """Hold every trace; return their names."""
    names = set()
    for report in oracle.judge(runner, methods, perturbed=True):
        assert report.passed, (report.trace, report.failures, report.unseen)
        assert report.comparison.state
        names.add(report.trace)
    return names


def methods_of(artifact: Artifact) -> dict[str, str]:
    return {role: name for name, method in artifact.manifest.methods.items() for role in method.roles}


def test_the_program_holds_parity(subjects: Mapping[str, Any], name: str) -> None:
    _, oracle, captured = subjects[name]
    runner = ProgramRunner(captured.program)
    names = judge(oracle, runner, runner.methods)
    assert "chunked prefill, second turn" in names
    assert (name == "deep_fusion") is (names >= IMAGE_TRACES)


@pytest.mark.slow
def test_xnnpack_holds_parity(subjects: Mapping[str, Any], artifacts: Mapping[str, Artifact], name: str) -> None:
    artifact = artifacts[name]
    with load_runner(artifact.path, artifact.manifest) as runner:
        names = judge(subjects[name][1], runner, methods_of(artifact))
    assert (name == "deep_fusion") is (names >= IMAGE_TRACES)


def test_the_eager_target_holds_parity(subjects: Mapping[str, Any], name: str, tmp_path: Path) -> None:
    _, oracle, captured = subjects[name]
    artifact = captured.lower("eager").save(tmp_path / "artifact")
    with load_runner(artifact.path, artifact.manifest) as runner:
        judge(oracle, runner, methods_of(artifact))


def test_the_encoder_writes_and_the_others_read(subjects: Mapping[str, Any]) -> None:
    program = subjects["deep_fusion"][2].program
    for row in (f"{CROSS}.keys", f"{CROSS}.values", SEEN):
        assert program.state[row].writers == ("vision_encoder",)
        assert program.state[row].readers == ("prefill", "decode")
    attention = "decoder.layers.1.fusion_layer.attn"
    for projection in ("k_proj", "v_proj"):
        assert program.weights[f"{attention}.{projection}.weight"].users == ("vision_encoder",)
    for projection in ("q_proj", "output_proj"):
        assert program.weights[f"{attention}.{projection}.weight"].users == ("decode", "prefill")


@pytest.mark.slow
def test_the_pte_has_one_place_for_what_the_encoder_writes(artifacts: Mapping[str, Artifact]) -> None:
    found = read_pte(artifacts["deep_fusion"].path / "model.pte").methods
    for row in (f"{CROSS}.keys", f"{CROSS}.values", SEEN):
        assert len({found[method].state[row] for method in ("vision_encoder", "prefill", "decode")}) == 1
    assert "aten::copy_" not in {*found["prefill"].operators, *found["decode"].operators}


# ---------------------------------------------------------------------------------------------------- wrong variants


class Broken(ProgramRunner):
    """What goes wrong where a method has state of its own, or starts from other values than were kept."""

    broken: str
    rows: tuple[str, ...]

    def run(self, method: str, **tensors: Tensor) -> dict[str, Tensor]:
        if method != self.broken:
            return super().run(method, **tensors)
        kept = {row: self.state[row].clone() for row in self.rows}
        if method != "vision_encoder":
            for row in self.rows:
                self.state[row].zero_()
        result = super().run(method, **tensors)
        for row, value in kept.items():
            self.state[row].copy_(value)
        return result


@pytest.mark.parametrize(
    ("broken", "rows"),
    [
        ("vision_encoder", (f"{CROSS}.keys", f"{CROSS}.values")),
        ("decode", (f"{CROSS}.keys", f"{CROSS}.values")),
        ("prefill", (f"{CROSS}.values",)),
        ("decode", (SEEN,)),
        ("vision_encoder", (SEEN,)),
    ],
    ids=["the encoder's own rows", "decode's own rows", "prefill's own values", "decode has not seen", "never seen"],
)
def test_state_that_is_not_shared_goes_red(subjects: Mapping[str, Any], broken: str, rows: tuple[str, ...]) -> None:
    _, oracle, captured = subjects["deep_fusion"]
    runner = Broken(captured.program)
    runner.broken, runner.rows = broken, rows
    failed = {report.trace for report in oracle.judge(runner, runner.methods) if not report.passed}
    assert failed == IMAGE_TRACES


# ---------------------------------------------------------------------------------------------------- at run time


def test_prompts_with_images_run_through_the_prefiller(subjects: Mapping[str, Any], tmp_path: Path) -> None:
    """Text, an image, text; then a turn with another image, in chunks."""
    model, _, captured = subjects["deep_fusion"]
    artifact = captured.lower("eager").save(tmp_path / "artifact")
    pictures = torch.randn(2, 1, 3, models.TILE, models.TILE)
    images = [
        ImageSegment.of(
            picture,
            0,
        )
        for picture in pictures
    ]
    text = [TextSegment(tuple(range(first, first + 5))) for first in (3, 11, 20)]
    suffix = TextSegment((models.PLACEHOLDER,))
    turns = ([text[0], images[0], suffix, text[1]], [images[1], suffix, text[2]])
    whole = [token for turn in turns for one in turn if isinstance(one, TextSegment) for token in one.tokens]
    assert model.eager is not None
    wanted = model.eager(model.module, torch.tensor(whole), tuple(pictures)).logits
    with load_runner(artifact.path, artifact.manifest) as runner:
        entry_points = EntryPoints.of(artifact.manifest)
        prefiller = TextPrefiller(entry_points, ImagePrefiller(runner, entry_points), chunk_size=4)
        session = Session(runner, artifact.manifest)
        for turn in turns:
            logits = prefiller.prefill(session, Prompt(tuple(turn)), Timings())
            torch.testing.assert_close(logits[0], wanted[session.position - 1], rtol=1e-4, atol=1e-4)
        assert session.position == len(whole)
        assert [(span.start, span.length) for span in session.images] == [(5, 0), (11, 0)]


# ---------------------------------------------------------------------------------------------------- the description


def test_the_first_token_that_attends_to_an_image_is_its_placeholder() -> None:
    model = models.deep_fusion()
    assert model.eager is not None
    tokens = torch.tensor([3, 4, models.PLACEHOLDER, 5])
    one, other = (model.eager(model.module, tokens, (torch.randn(1, 3, 8, 8),)).logits for _ in range(2))
    torch.testing.assert_close(one[:2], other[:2])
    assert not torch.allclose(one[2], other[2])


def test_a_model_with_caches_of_its_own_is_refused() -> None:
    module = models.llama3().module
    module.setup_caches(batch_size=1, dtype=torch.float32)  # type: ignore[operator]
    with pytest.raises(ModelError, match="the caches of this TransformerDecoder are set up; describe it before"):
        describe(module)


@pytest.mark.parametrize("context", [0, models.CONTEXT + 1])
def test_an_impossible_context_is_refused(context: int) -> None:
    with pytest.raises(ModelError, match=f"max context is {context}; this TransformerDecoder allows 1 to 32 positions"):
        describe(models.llama3().module, max_context=context)


def test_a_model_that_sees_needs_image_settings_and_another_takes_none() -> None:
    with pytest.raises(ModelError, match="DeepFusionModel needs image and pixel_shape"):
        describe(models.deep_fusion_module())
    with pytest.raises(ModelError, match="TransformerDecoder sees no images: leave out image and pixel_shape"):
        describe(models.llama3().module, image=models.IMAGE, pixel_shape=(1, 3, 8, 8))


def test_image_settings_that_give_a_picture_positions_are_refused() -> None:
    import dataclasses

    image = dataclasses.replace(models.IMAGE, tokens=5)
    with pytest.raises(ModelError, match=r"have 5 tokens, suffix \[47\]; expected 0 and a suffix"):
        describe(models.deep_fusion_module(), image=image, pixel_shape=(1, 3, 8, 8))


def test_another_surface_is_refused() -> None:
    with pytest.raises(ModelError, match="RMSNorm has the parts none; expected those of a torchtune"):
        describe(torchtune("modules").RMSNorm(dim=8))
