"""The few tests that guard what the product stands on; `plant_defects.py` shows that each can go red."""

import random
from pathlib import Path

import pytest
import torch

import triptych
from tests.compiler.tiny import TinyAttention, TinyBlock, TinyModel, describe
from triptych.compiler.adapters.hugging_face import load
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES
from triptych.compiler.trace import CallTrace, Step, compare, reference, replay
from triptych.demo.scenes import random_scene, render
from triptych.manifest import Manifest
from triptych.runtime.images import preprocess
from triptych.runtime.loaders import load_runner
from triptych.verification import verify

# Another value makes the reference another model than the artifact's: parity must notice.
REFERENCE_LAYER_SCALE = 1.0


def test_decode_reads_what_prefill_wrote(tmp_path: Path) -> None:
    """One `.pte`, prefill then decode: the logits are those of the eager model over the whole sequence."""
    model = describe(TinyModel(TinyBlock(TinyAttention())).eval())
    artifact = triptych.export(model, out=tmp_path / "artifact", target="portable")
    trace = CallTrace("tokens", torch.arange(2, 18), (Step("prefill", 9), Step("decode", 7)))
    methods = {role: name for name, method in artifact.manifest.methods.items() for role in method.roles}
    with load_runner(artifact.path, artifact.manifest) as runner:
        comparison = compare(
            trace, reference(model, trace), replay(runner, trace, methods), DEFAULT_TOLERANCES["float32"]
        )
    assert comparison.failures(DEFAULT_TOLERANCES["float32"]) == ()


def test_weights_are_stored_once(demo_checkpoint: Path) -> None:
    """The embedding and the projection are tied in the model and stay one storage, and methods share all others."""
    program = triptych.export(demo_checkpoint, max_context=64).capture().program
    tied = [weight for weight in program.weights.values() if "lm_head.weight" in weight.names]
    assert [len(weight.names) for weight in tied] == [2]
    assert tied[0].users == ("decode", "prefill", "token_embedding")
    stored = sum(weight.nbytes for weight in program.weights.values())
    module = load(demo_checkpoint).module
    unique = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in module.parameters()}
    assert stored <= 1.01 * sum(unique.values())


@pytest.fixture(scope="module")
def eager_artifact(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("guards") / "eager"
    return triptych.export(demo_checkpoint, out=out, target="eager", max_context=128).path


def test_parity_with_the_eager_model(demo_checkpoint: Path, eager_artifact: Path) -> None:
    model = load(demo_checkpoint)
    layer = next(child for name, child in model.module.named_modules() if name.endswith("layers.1.mlp"))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(REFERENCE_LAYER_SCALE)
    report = verify(eager_artifact, model, tokens=4, prompt_lengths=(1, 17))
    assert {trace.trace: (*trace.failures[:2], *trace.unseen) for trace in report.traces if not trace.passed} == {}


def test_pixel_values_equal_those_of_transformers(demo_checkpoint: Path, eager_artifact: Path) -> None:
    from transformers import AutoProcessor

    manifest = Manifest.load(eager_artifact)
    assert manifest.image is not None
    assert manifest.image.std is not None
    processor = AutoProcessor.from_pretrained(demo_checkpoint, backend="pil")
    rng = random.Random(0)
    port = manifest.methods["vision_encoder"].input("pixel_values")
    for size in (32, 100, 256):
        picture = render(random_scene(rng, test=True), rng, size=size)
        wanted = processor.image_processor(images=[picture], return_tensors="pt")["pixel_values"]
        step = 1 / 255 / min(manifest.image.std)
        assert torch.allclose(preprocess(picture, manifest.image, port), wanted, rtol=0, atol=step + 1e-6)
