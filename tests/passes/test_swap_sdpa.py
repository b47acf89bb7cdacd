"""`swap-sdpa` changes the kernel of cached attention and leaves every other attention alone."""

from collections import Counter
from typing import Any

import pytest

from tests.compiler import tiny
from tests.passes import attentions
from triptych.compiler.program import Program
from triptych.compiler.stages import Source
from triptych.errors import PipelineError


def operators(program: Program, method: str) -> Counter[str]:
    nodes = program.methods[method].exported.graph.nodes
    return Counter(str(node.target) for node in nodes if node.op == "call_function")


@pytest.fixture(scope="module")
def cached() -> Source:
    return Source(tiny.tiny()).transform("static-kv-cache")


def test_cached_attention_becomes_one_operator_a_layer(cached: Source) -> None:
    program = cached.transform("swap-sdpa").capture().program
    for method in ("prefill", "decode"):
        found = operators(program, method)
        assert found["triptych.cached_sdpa.default"] == 2
        assert found["aten.scaled_dot_product_attention.default"] == 0


def test_without_it_the_attention_is_aten(cached: Source) -> None:
    found = operators(cached.capture().program, "prefill")
    assert found["triptych.cached_sdpa.default"] == 0
    assert found["aten.scaled_dot_product_attention.default"] == 2


@pytest.mark.parametrize(
    ("caches", "found"),
    [
        ("ring-kv-cache", {"ring_sdpa": 1, "cached_sdpa": 1}),
        ("sink-kv-cache{window=9}", {"ring_sdpa": 2}),
        ("static-kv-cache,quantized-kv-cache", {"quantized_cached_sdpa": 2}),
        ("ring-kv-cache,quantized-kv-cache", {"ring_sdpa": 1, "quantized_cached_sdpa": 1}),
    ],
)
def test_every_kind_of_cache_has_its_operator(caches: str, found: dict[str, int]) -> None:
    model = tiny.tiny(attentions.Banded(5), tiny.TinyAttention())
    program = tiny.captured(model, f"{caches},swap-sdpa").program
    for method in ("prefill", "decode"):
        counts = operators(program, method)
        wanted = {f"triptych.{name}.default": count for name, count in found.items()}
        assert {name: count for name, count in counts.items() if name.endswith("sdpa.default")} == wanted
        assert counts["aten.scaled_dot_product_attention.default"] == 0


def test_it_says_where_it_matched(cached: Source) -> None:
    result = cached.transform("swap-sdpa").results[-1]
    assert [match.where for match in result.matches] == ["blocks.0.attention", "blocks.1.attention"]


def test_a_second_run_has_nothing_left_to_do(cached: Source) -> None:
    with pytest.raises(PipelineError, match="its kernel is OperatorKernels already"):
        cached.transform("swap-sdpa,swap-sdpa")


def test_it_leaves_the_stage_before_as_it_was(cached: Source) -> None:
    cached.transform("swap-sdpa")
    assert operators(cached.capture().program, "decode")["triptych.cached_sdpa.default"] == 0


def test_the_vision_towers_attention_is_left_with_a_reason(demo_model: Any) -> None:
    result = Source(demo_model).transform("static-kv-cache,swap-sdpa").results[-1]
    assert len(result.matches) == 4
    assert len(result.refusals) == 3
    assert all("vision" in refusal.where for refusal in result.refusals)
    assert {refusal.reason for refusal in result.refusals} == {"attends without a cache; the aten call stays"}
