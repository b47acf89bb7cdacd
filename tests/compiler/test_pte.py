"""What the emitted file really holds: shared state and shared weights, proved from arenas, offsets and segments."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from triptych.compiler.model import Model
from triptych.compiler.targets.pte import PteFile, read_pte
from triptych.errors import ArtifactError
from triptych.manifest import Manifest
from triptych.runtime.loaders import load_runner

pytestmark = pytest.mark.slow
ARTIFACTS = ["demo_xnnpack", "demo_quantized_xnnpack", "demo_portable", "smollm2_cut_xnnpack"]
TEXT_METHODS = ("prefill", "decode")


@pytest.fixture(params=ARTIFACTS)
def artifact(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def pte(artifact: Path) -> PteFile:
    return read_pte(artifact / "model.pte")


def stored(pte: PteFile) -> int:
    return sum(pte.weights.values()) + sum(pte.constants.values())


def unique_bytes(model: Model, prefix: str = "") -> int:
    tensors = {id(tensor): tensor for name, tensor in model.module.named_parameters() if name.startswith(prefix)}
    return sum(tensor.nbytes for tensor in tensors.values())


def test_every_row_of_the_manifest_lies_in_one_place_for_all_methods(artifact: Path, pte: PteFile) -> None:
    rows = {row.name for row in Manifest.load(artifact).state}
    assert rows
    for row in rows:
        places = {pte.methods[method].state[row] for method in TEXT_METHODS}
        assert len(places) == 1, f"{row}: {places}"


def test_no_two_rows_overlap(artifact: Path, pte: PteFile) -> None:
    places = pte.methods["prefill"].state
    assert set(places) == {row.name for row in Manifest.load(artifact).state}
    for (one, a), (other, b) in combinations(places.items(), 2):
        apart = a.arena != b.arena or a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
        assert apart, f"{one} and {other} overlap"


def test_a_row_has_the_size_of_its_shape(artifact: Path, pte: PteFile) -> None:
    for row in Manifest.load(artifact).state:
        assert row.dtype == "float32"
        assert pte.methods["decode"].state[row.name].nbytes == 4 * torch.Size(row.shape).numel()


def test_methods_without_state_name_none(pte: PteFile) -> None:
    assert not pte.methods["token_embedding"].state


@pytest.mark.parametrize("name", ["demo_xnnpack", "demo_quantized_xnnpack", "smollm2_cut_xnnpack"])
def test_prefill_and_decode_refer_to_the_same_weights(name: str, request: pytest.FixtureRequest) -> None:
    pte = read_pte(request.getfixturevalue(name) / "model.pte")
    prefill, decode = (pte.methods[method].weights for method in TEXT_METHODS)
    assert prefill
    assert sum(pte.weights[key] for key in prefill & decode) >= 0.99 * sum(pte.weights[key] for key in prefill | decode)


def test_the_embedding_table_of_decode_is_that_of_token_embedding(pte: PteFile) -> None:
    shared = pte.methods["token_embedding"].constants & pte.methods["decode"].constants
    assert max(pte.constants[index] for index in shared) == max(pte.constants.values())


def test_the_embedded_model_stores_each_weight_once(demo_xnnpack: Path, demo_model: Model) -> None:
    """The tied table lies there twice: packed for the projection, and as rows to look up."""
    table = demo_model.module.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    assert stored(read_pte(demo_xnnpack / "model.pte")) <= 1.05 * (unique_bytes(demo_model) + table)


def test_portable_kernels_store_each_weight_once(demo_portable: Path, demo_model: Model) -> None:
    """The tied table lies there twice: transposed for the projection, and as rows to look up."""
    table = demo_model.module.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    assert stored(read_pte(demo_portable / "model.pte")) <= 1.02 * (unique_bytes(demo_model) + table)


def test_smollm2_stores_each_weight_once(smollm2_cut_xnnpack: Path, smollm2_cut_model: Model) -> None:
    table = smollm2_cut_model.module.get_input_embeddings().weight.nbytes  # type: ignore[operator]
    assert stored(read_pte(smollm2_cut_xnnpack / "model.pte")) <= 1.05 * (unique_bytes(smollm2_cut_model) + table)


def test_the_file_is_not_much_larger_than_what_it_stores(artifact: Path, pte: PteFile) -> None:
    assert (artifact / "model.pte").stat().st_size <= 1.1 * stored(pte) + 1_500_000


def test_quantizing_shrinks_the_decoder(demo_quantized_xnnpack: Path, demo_xnnpack: Path, demo_model: Model) -> None:
    small, large = (stored(read_pte(path / "model.pte")) for path in (demo_quantized_xnnpack, demo_xnnpack))
    decoder = unique_bytes(demo_model, "model.language_model")
    assert large - small > 0.7 * decoder


@pytest.mark.parametrize("name", ["demo_xnnpack", "smollm2_cut_xnnpack"])
def test_linear_algebra_is_delegated_and_attention_is_one_kernel(name: str, request: pytest.FixtureRequest) -> None:
    pte = read_pte(request.getfixturevalue(name) / "model.pte")
    for method in TEXT_METHODS:
        found = pte.methods[method]
        assert found.delegates["XnnpackBackend"] >= 4
        assert found.operators["llama::custom_sdpa.out"] == 4
        assert not [operator for operator in found.operators if "linear" in operator or "mm" in operator]


def test_portable_has_no_delegate_and_no_foreign_kernel(demo_portable: Path) -> None:
    for method in read_pte(demo_portable / "model.pte").methods.values():
        assert not method.delegates
        assert {operator.partition("::")[0] for operator in method.operators} <= {
            "aten",
            "dim_order_ops",
            "executorch_prim",
        }


def test_decode_reads_the_cache_that_prefill_wrote(artifact: Path) -> None:
    manifest = Manifest.load(artifact)
    tokens = torch.arange(5, 14).unsqueeze(0)
    next_token = {"tokens": torch.tensor([[7]]), "start_pos": torch.tensor([tokens.shape[1]])}
    with load_runner(artifact, manifest) as runner:
        embeds = runner.run("token_embedding", tokens=tokens)["embeds"]
        runner.run("prefill", embeds=embeds, start_pos=torch.tensor([0]))
        assert all(row[:, : tokens.shape[1]].any() for row in runner.state.values())
        assert not any(row[:, tokens.shape[1] :].any() for row in runner.state.values())
        seen = runner.run("decode", **next_token)["logits"].clone()
        torch.testing.assert_close(runner.run("decode", **next_token)["logits"], seen, rtol=0, atol=0)
        for row in runner.state.values():
            row[:, : tokens.shape[1]] = 0
        blind = runner.run("decode", **next_token)["logits"]
    assert float((blind - seen).abs().max()) > 1e-2 * float(seen.abs().max())


@pytest.mark.parametrize("keep", [0, 3, 8, 100, 5000, -1000])
def test_a_truncated_file_is_an_artifact_error(demo_xnnpack: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes((demo_xnnpack / "model.pte").read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"model\.pte"):
        read_pte(path)


def test_a_file_of_another_kind_is_an_artifact_error(tmp_path: Path) -> None:
    path = tmp_path / "model.pte"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ArtifactError, match="is no ExecuTorch program"):
        read_pte(path)
