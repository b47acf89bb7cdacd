"""`ring-kv-cache`: sliding layers keep their window and no more, and nobody can tell from the outputs."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.compiler import tiny
from tests.passes import attentions
from tests.passes.lowered import assert_lowered_parity
from triptych.compiler.model import Model
from triptych.compiler.program import Program
from triptych.compiler.stages import Source
from triptych.errors import PipelineError, RunError, VerificationError
from triptych.modules import kv_cache
from triptych.modules.operators import cache as operators
from triptych.passes.ring_kv_cache import RingKVCachePass
from triptych.runtime.loaders import load_runner
from triptych.runtime.segments import TextSegment
from triptych.runtime.session import Session
from triptych.testing import check_pass, default_model

WINDOW = 5


def mixed_model() -> Model:
    """A sliding layer and a full one, as in Gemma 3."""
    return tiny.tiny(attentions.Banded(WINDOW), tiny.TinyAttention())


def bytes_of_state(program: Program) -> int:
    return sum(row.initial.nbytes for row in program.state.values())


def operators_of(program: Program, method: str) -> Counter[str]:
    nodes = program.methods[method].exported.graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


def test_the_window_is_all_a_sliding_layer_keeps() -> None:
    program = tiny.captured(mixed_model(), "ring-kv-cache").program
    rows = {name: (row.shape[1], row.layout) for name, row in program.state.items()}
    assert rows == {
        f"blocks.{layer}.attention.routed_attention.cache.{part}": expected
        for layer, expected in enumerate([(WINDOW, "BRHD"), (tiny.CONTEXT_LENGTH, "BSHD")])
        for part in ("keys", "values")
    }
    static = tiny.captured(mixed_model(), "static-kv-cache").program
    saved = 2 * (tiny.CONTEXT_LENGTH - WINDOW) * tiny.WIDTH * 4
    assert bytes_of_state(static) - bytes_of_state(program) == saved


def test_it_matches_every_layer_and_keeps_parity() -> None:
    check_pass(RingKVCachePass(), mixed_model(), matches=2)


@pytest.mark.parametrize("window", [1, 2, 3, 7, tiny.CONTEXT_LENGTH - 1])
def test_windows_of_any_length_keep_parity(window: int) -> None:
    """Prefills of 9 and 8 positions are longer and shorter than these rings and run across their ends."""
    check_pass(RingKVCachePass(), tiny.tiny(attentions.Banded(window), tiny.TinyAttention()), matches=2)


def test_the_operators_keep_parity_and_legalize_to_aten() -> None:
    captured = tiny.captured(mixed_model(), "ring-kv-cache,swap-sdpa")
    for method in ("prefill", "decode"):
        found = operators_of(captured.program, method)
        assert (found["triptych.ring_sdpa.default"], found["triptych.update_ring_cache.default"]) == (1, 2)
        assert (found["triptych.cached_sdpa.default"], found["triptych.update_cache.default"]) == (1, 2)
    legal = captured.rewrite("legalize-aten").program
    assert not [name for name in operators_of(legal, "decode") if name.startswith("triptych.")]


def test_one_position_needs_no_mask_and_no_copy_in_executorch() -> None:
    legal = tiny.captured(mixed_model(), "ring-kv-cache,swap-sdpa").rewrite("legalize-executorch").program
    decode, prefill = operators_of(legal, "decode"), operators_of(legal, "prefill")
    assert (decode["llama.custom_sdpa.default"], decode["llama.update_cache.default"]) == (2, 4)
    assert (decode["aten.cat.default"], decode["aten.copy_.default"], decode["aten.where.Scalar"]) == (0, 0, 0)
    assert (prefill["llama.custom_sdpa.default"], prefill["llama.update_cache.default"]) == (2, 2)
    assert prefill["aten.copy_.default"] == 2


@pytest.mark.parametrize("cache", ["static-kv-cache", "ring-kv-cache"])
def test_masks_are_made_once_for_each_window(cache: str) -> None:
    """Three layers have one window, a fourth has another."""

    def masks(*layers: int) -> int:
        model = tiny.tiny(*(attentions.Banded(window) for window in layers))
        legal = tiny.captured(model, f"{cache},swap-sdpa").rewrite("legalize-executorch").program
        return operators_of(legal, "prefill")["aten.where.Scalar"]

    assert masks(5, 5, 5) == 1
    assert masks(5, 5, 5, 6) == 2


def test_it_keeps_parity_after_lowering(tmp_path: Path) -> None:
    assert_lowered_parity(mixed_model(), "ring-kv-cache,swap-sdpa", "xnnpack", tmp_path)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("model", [tiny.tiny, default_model])
def test_a_model_without_windows_is_refused(model: object) -> None:
    with pytest.raises(PipelineError, match="no layer has a sliding window shorter than the context of"):
        Source(model()).transform("ring-kv-cache")  # type: ignore[operator]


def test_a_window_of_the_context_is_no_window() -> None:
    with pytest.raises(PipelineError, match=f"shorter than the context of {WINDOW}; use static-kv-cache"):
        Source(mixed_model()).transform(f"ring-kv-cache{{max={WINDOW}}}")


def test_what_cannot_be_cached_is_refused_with_its_reason() -> None:
    with pytest.raises(PipelineError, match=r"ring-kv-cache: a decoder is cached whole .* blocks\.1\.attention passes"):
        Source(tiny.tiny(attentions.Banded(WINDOW), attentions.Masked())).transform("ring-kv-cache")


@pytest.mark.parametrize("slots", [0, tiny.CONTEXT_LENGTH + 1])
def test_an_impossible_max_is_refused(slots: int) -> None:
    with pytest.raises(PipelineError, match=f"ring-kv-cache: max is {slots}, the model allows 1 to 24"):
        Source(mixed_model()).transform(f"ring-kv-cache{{max={slots}}}")


# ------------------------------------------------------------------------------------------------ sessions


def test_a_session_resets_whole_rings_and_refuses_to_go_back(tmp_path: Path) -> None:
    artifact = tiny.captured(mixed_model(), "ring-kv-cache,swap-sdpa").lower("eager").save(tmp_path / "artifact")
    with load_runner(artifact.path, artifact.manifest) as runner:
        session = Session(runner, artifact.manifest)
        session.append(TextSegment((1, 2, 3)))
        session.note_run(0)
        with pytest.raises(RunError, match=r"cannot truncate: state row blocks\.0\.attention\.routed_attention"):
            session.truncate(2)
        ring = runner.state["blocks.0.attention.routed_attention.cache.keys"]
        ring.fill_(1)
        session.reset()
        assert not ring.any()


# ------------------------------------------------------------------------------------------------ wrong variants


def _one_slot_on(position: Tensor, slots: int, _sink: int = 0) -> Tensor:
    return (position + 1) % slots


def test_a_slot_off_by_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "ring_slot", _one_slot_on)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(RingKVCachePass(), mixed_model(), matches=2)


def test_rows_taken_from_the_neighbour_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = operators.ring_source

    def wrong(*arguments: object) -> tuple[Tensor, Tensor]:
        index, written = right(*arguments)  # type: ignore[arg-type]
        return (index - 1).clamp_min(0), written

    monkeypatch.setattr(operators, "ring_source", wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(RingKVCachePass(), mixed_model(), matches=2)


@pytest.mark.parametrize("error", [-1, 1])
def test_a_ring_off_by_one_is_noticed(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(kv_cache.RingKVCache):
        def __init__(self, window: int, *sizes: int, dtype: torch.dtype = torch.float32, sink: int = 0) -> None:
            super().__init__(window + error, *sizes[:3], dtype, sink)

    monkeypatch.setattr("triptych.passes.ring_kv_cache.RingKVCache", Wrong)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(RingKVCachePass(), mixed_model(), matches=2)


def test_the_state_alone_gives_a_wrong_write_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last write of a conversation is read by nobody."""
    from triptych.compiler.kv_rows import read_rows, wanted_row

    name, row = "a.routed_attention.cache.keys", torch.zeros(1, WINDOW, 1, 2)
    whole = torch.randn(1, 13, 1, 2)
    operators.update_ring_cache(row, whole, torch.tensor([0]))
    kept = read_rows({name: row}, 13)[name]
    wanted = wanted_row({name: whole}, name, kept)
    assert wanted is not None
    torch.testing.assert_close(kept, wanted, rtol=0, atol=0)
    torch.testing.assert_close(kept, whole[:, 8:], rtol=0, atol=0)
    monkeypatch.setattr(operators, "ring_slot", _one_slot_on)
    operators.update_ring_cache(row, whole[:, :1], torch.tensor([13]))
    later = read_rows({name: row}, 14)[name]
    assert not torch.equal(later, torch.cat([whole[:, 9:], whole[:, :1]], dim=1))
