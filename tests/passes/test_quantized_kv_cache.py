"""`quantized-kv-cache`: int8 rows, within the tolerance it declares, whatever cache came before."""

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
from triptych.errors import PipelineError, VerificationError
from triptych.modules.kv_cache import quantized
from triptych.modules.operators import attention as operators
from triptych.passes.quantized_kv_cache import QuantizedKVCachePass
from triptych.testing import check_pass, default_model

DECLARED = QuantizedKVCachePass.tolerances["float32"]
CACHES = ("static-kv-cache", "ring-kv-cache", "static-kv-cache,swap-sdpa", "ring-kv-cache,swap-sdpa")


def mixed_model() -> Model:
    return tiny.tiny(attentions.Banded(5), tiny.TinyAttention())


def bytes_of_state(program: Program) -> int:
    return sum(row.initial.nbytes for row in program.state.values())


@pytest.mark.parametrize("caches", CACHES)
def test_it_keeps_parity_within_its_tolerance(caches: str) -> None:
    checked = check_pass(QuantizedKVCachePass(), mixed_model(), after=caches, matches=2, idempotent=False)
    assert max(one.comparison.worst_relative for one in checked.traces) > 1e-4, "rounding shows"


def test_the_embedded_model_keeps_parity() -> None:
    check_pass(QuantizedKVCachePass(), default_model(), after="static-kv-cache", matches=4, idempotent=False)


def test_the_embedded_model_keeps_parity_after_lowering(tmp_path: Path) -> None:
    passes = "static-kv-cache,quantized-kv-cache,swap-sdpa"
    assert_lowered_parity(default_model(), passes, "xnnpack", tmp_path, declared=DECLARED)


def test_int8_rings_keep_parity_after_lowering(tmp_path: Path) -> None:
    passes = "ring-kv-cache,quantized-kv-cache,swap-sdpa"
    assert_lowered_parity(mixed_model(), passes, "xnnpack", tmp_path, declared=DECLARED)


def test_rows_and_scales() -> None:
    """One byte an element, and a float a position and head: here (16 + 4) / 64 of the float cache."""
    program = tiny.captured(passes="static-kv-cache,quantized-kv-cache").program
    prefix = "blocks.0.attention.routed_attention.cache"
    rows = {name: (row.dtype, row.shape) for name, row in program.state.items() if name.startswith(prefix)}
    assert rows == {
        f"{prefix}.{part}{end}": (dtype, (1, tiny.CONTEXT_LENGTH, tiny.HEADS, width))
        for part in ("keys", "values")
        for end, dtype, width in (("", torch.int8, 16), ("_scales", torch.float32, 1))
    }
    whole = tiny.captured(passes="static-kv-cache").program
    assert bytes_of_state(program) * 64 == bytes_of_state(whole) * 20


def test_executorch_gets_the_rows_in_use_as_floats() -> None:
    captured = tiny.captured(passes="static-kv-cache,quantized-kv-cache,swap-sdpa")
    legal = captured.rewrite("legalize-executorch").program
    for method in ("prefill", "decode"):
        nodes = legal.methods[method].exported.graph.nodes
        found = Counter(str(node.target) for node in nodes)
        assert (found["llama.custom_sdpa.default"], found["llama.update_cache.default"]) == (2, 8)
        (keys, _) = (node.args[1] for node in nodes if str(node.target) == "llama.custom_sdpa.default")
        assert not isinstance(keys.meta["val"].shape[1], int), "not all slots"


def test_an_int8_cache_is_refused() -> None:
    with pytest.raises(PipelineError, match=r"blocks\.0\.attention: its cache is int8 already"):
        Source(tiny.tiny()).transform("static-kv-cache,quantized-kv-cache,quantized-kv-cache")


def test_it_needs_a_cache() -> None:
    with pytest.raises(PipelineError, match="quantized-kv-cache requires kv-cache"):
        Source(tiny.tiny()).transform("quantized-kv-cache")


def test_it_stands_behind_the_cache() -> None:
    with pytest.raises(PipelineError, match="must come after ring-kv-cache"):
        Source(tiny.tiny()).transform("static-kv-cache,quantized-kv-cache,ring-kv-cache")


# ------------------------------------------------------------------------------------------------ wrong variants


def _of_a_neighbour(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (rows.float() * scales.roll(1, dims=1)).to(dtype)


def test_the_scale_of_a_neighbour_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "dequantize_rows", _of_a_neighbour)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(QuantizedKVCachePass(), tiny.tiny(), after="static-kv-cache", matches=2, idempotent=False)


def test_the_scale_of_a_neighbour_is_noticed_in_a_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "dequantize_rows", _of_a_neighbour)
    with pytest.raises(VerificationError, match="computes something else"):
        check_pass(QuantizedKVCachePass(), mixed_model(), after="ring-kv-cache", matches=2, idempotent=False)


def test_scales_off_by_a_tenth_are_noticed_in_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    right = quantized.torch.ops.triptych.update_quantized_cache

    def wrong(cache: Tensor, scales: Tensor, value: Tensor, start_pos: Tensor) -> None:
        right(cache, scales, value, start_pos)
        scales[:, int(start_pos)] *= 1.1

    monkeypatch.setattr(torch.ops.triptych, "update_quantized_cache", wrong)
    with pytest.raises(VerificationError, match=r"cache\.(keys|values)"):
        check_pass(QuantizedKVCachePass(), tiny.tiny(), after="static-kv-cache", matches=2, idempotent=False)
