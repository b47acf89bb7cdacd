"""Pipelines as text: what is printed parses again, and what does not parse is named with its column."""

import pytest

from triptych.api import default_pipeline
from triptych.compiler.pipeline import build, parse
from triptych.errors import PipelineError
from triptych.passes.static_kv_cache import StaticKVCachePass
from triptych.passes.swap_sdpa import SwapSDPA

ROUND_TRIPS = (
    "capture",
    "static-kv-cache",
    "static-kv-cache{max=2048}",
    "static-kv-cache,swap-sdpa",
    "static-kv-cache{max=8},swap-sdpa,capture",
    "capture,last-token-logits",
    "last-token-logits,legalize-aten",
    "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture,last-token-logits,legalize-executorch,expand-tanh-gelu",
    default_pipeline(512),
    default_pipeline(512, "8da4w"),
)


@pytest.mark.parametrize("text", ROUND_TRIPS)
def test_what_is_printed_parses_to_the_same_pipeline(text: str) -> None:
    pipeline = parse(text)
    assert str(pipeline) == text
    assert parse(str(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("written", "printed"),
    [
        ("  static-kv-cache { max = 8 } , swap-sdpa ", "static-kv-cache{max=8},swap-sdpa"),
        ("static-kv-cache{},capture", "static-kv-cache,capture"),
        ("\tcapture\n,\nlast-token-logits", "capture,last-token-logits"),
    ],
)
def test_white_space_means_nothing(written: str, printed: str) -> None:
    assert str(parse(written)) == printed


def test_options_have_the_types_of_the_fields() -> None:
    assert parse("static-kv-cache{max=2048}").source == (StaticKVCachePass(max=2048),)


def test_a_sequence_of_passes_is_the_same_pipeline_as_its_text() -> None:
    assert build([StaticKVCachePass(max=8), SwapSDPA(), None]) == parse("static-kv-cache{max=8},swap-sdpa,capture")


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("", 1, "expected a pass name"),
        ("capture,", 9, "after the last ','"),
        (",capture", 1, "expected a pass name"),
        ("capture,,last-token-logits", 9, "expected a pass name"),
        ("capture last-token-logits", 9, "expected ','"),
        ("Swap-SDPA", 1, "expected a pass name"),
        ("static-kv-cache{max=2", 16, "expected ','"),
        ("static-kv-cache{max}", 17, "expected option=value, found 'max'"),
        ("static-kv-cache{max=2,max=3}", 23, "option 'max' is given twice"),
        ("static-kv-cache{size=3}", 17, "has no option 'size'; its options: max"),
        ("swap-sdpa{max=3}", 11, "has no option 'max'; its options: none"),
        ("static-kv-cache{max=long}", 17, "option 'max' of static-kv-cache is 'long'; expected int"),
        ("static-kv-cache{max=1.5}", 17, "expected int"),
        ("capture{x=1}", 8, "'capture' has no options"),
        ("static-kv-cache,swap-sdpa{a=1}", 27, "no option 'a'"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_column(text: str, column: int, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse(text)
    assert f"column {column}:" in str(caught.value)
    assert message in str(caught.value)


def test_an_option_that_is_missing_is_named() -> None:
    with pytest.raises(PipelineError, match=r"quantize.*recipe"):
        parse("quantize,capture")


def test_an_unknown_pass_is_named_beside_the_known_ones() -> None:
    with pytest.raises(PipelineError, match=r"no pass is called 'warp-sdpa'; known: .*swap-sdpa"):
        parse("warp-sdpa")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("swap-sdpa,static-kv-cache", "swap-sdpa must come after static-kv-cache"),
        ("swap-sdpa", "swap-sdpa requires kv-cache"),
        ("swap-sdpa,capture", "swap-sdpa requires kv-cache"),
        ("last-token-logits,capture", "last-token-logits rewrites a captured program: put it after 'capture'"),
        ("capture,static-kv-cache", "static-kv-cache changes the module: put it before 'capture'"),
        ("capture,last-token-logits,capture", "captures 2 times"),
        ("static-kv-cache,last-token-logits", "before 'capture'"),
    ],
)
def test_an_impossible_order_is_refused(text: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse(text)
