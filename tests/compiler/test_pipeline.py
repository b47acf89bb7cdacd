"""Pipelines as text: what is printed parses again, and what does not parse is named with its column."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.test_budget import BUDGETS
from triptych.api import default_pipeline
from triptych.compiler import pipeline
from triptych.compiler.budget import Budget
from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog, Pass, SourceTransform
from triptych.compiler.pipeline import Pipeline, as_pipeline, build, format_pass, parse
from triptych.compiler.program import Method
from triptych.compiler.registry import find_pass, pass_names
from triptych.errors import PipelineError
from triptych.passes.assert_cost import AssertCost
from triptych.passes.prune_vocabulary import PruneVocabulary
from triptych.passes.quantize import Quantize
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
    "capture,assert-cost{decode.bytes<=60MB,prefill.flops@S=128&T=2<2G},last-token-logits,assert-cost{*.flops<=1K}",
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


# ---------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Toy(GraphPass):
    """A pass with an option of every kind."""

    name: ClassVar[str] = "toy"

    ratio: float = 0.5
    fast: bool = False
    careful: bool = True
    word: str = "plain"
    mode: Literal["left", "right", 3] = "left"
    limit: int | None = None
    note: str | None = None
    share: float | None = None
    size: int | float = 1
    budgets: tuple[Budget, ...] = ()

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Do nothing."""


def read(text: str) -> Pass:
    with patch.object(pipeline, "find_pass", {"toy": Toy}.__getitem__):
        (one,) = parse(text).program
    return one


@pytest.mark.parametrize(
    ("text", "one"),
    [
        ("toy", Toy()),
        ("toy{ratio=0.25}", Toy(ratio=0.25)),
        ("toy{ratio=1e-07}", Toy(ratio=1e-07)),
        ("toy{ratio=-inf}", Toy(ratio=float("-inf"))),
        ("toy{fast=true,careful=false}", Toy(fast=True, careful=False)),
        ("toy{word=a.b-c/d:e=f}", Toy(word="a.b-c/d:e=f")),
        ("toy{mode=right}", Toy(mode="right")),
        ("toy{mode=3}", Toy(mode=3)),
        ("toy{limit=-3,note=none,share=2.0}", Toy(limit=-3, note="none", share=2.0)),
        ("toy{size=2.5}", Toy(size=2.5)),
        ("toy{size=7}", Toy(size=7)),
        (
            "toy{fast=true,a.bytes<=1KB,*.flops<2}",
            Toy(fast=True, budgets=(Budget.parse("a.bytes<=1KB"), Budget.parse("*.flops<2"))),
        ),
    ],
)
def test_every_kind_of_option_is_read_and_printed(text: str, one: Toy) -> None:
    assert read(text) == one
    assert format_pass(one) == text


def test_elements_written_bare_may_stand_anywhere() -> None:
    text = "toy{ a.bytes<=1KB , limit=3, b.bytes <= 2KB }"
    assert read(text) == Toy(limit=3, budgets=(Budget.parse("a.bytes<=1KB"), Budget.parse("b.bytes<=2KB")))


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("toy{mode=up}", 5, "option 'mode' of toy is 'up'; expected left or right or 3"),
        ("toy{fast=yes}", 5, "option 'fast' of toy is 'yes'; expected true or false"),
        ("toy{fast=1}", 5, "expected true or false"),
        ("toy{ratio=half}", 5, "option 'ratio' of toy is 'half'; expected float"),
        ("toy{limit=2.0}", 5, "option 'limit' of toy is '2.0'; expected int"),
        ("toy{limit=none}", 5, "option 'limit' of toy is 'none'; expected int"),
        ("toy{size=big}", 5, "expected int or float"),
        ("toy{fast=true,   limit=x}", 18, "option 'limit'"),
        ("toy{fast=true, a.bytes}", 16, "'a.bytes' is no budget"),
        ("toy{word=}", 5, "'word=' is no budget"),
        ("toy{budgets=a.bytes<1}", 5, "the budgets of toy are written without 'budgets='"),
    ],
)
def test_a_wrong_value_is_named_with_its_column_and_what_was_expected(text: str, column: int, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        read(text)
    assert f"column {column}:" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("word", ["", " ", "two words", "a,b", "a{b", "a}b", "a\n", "\u2003x"])
def test_a_text_that_would_be_read_differently_is_refused_where_it_is_printed(word: str) -> None:
    with pytest.raises(PipelineError) as caught:
        format_pass(Toy(word=word))
    assert f"option 'word' of toy is {word!r}, which no pipeline text gives back" in str(caught.value)
    assert "no comma, brace or white space" in str(caught.value)
    with pytest.raises(PipelineError, match="option 'recipe' of quantize"):
        str(Pipeline(source=(Quantize(word),)))


@pytest.mark.parametrize(
    "one",
    [
        Toy(ratio=float("nan")),
        Toy(limit=True),
        Toy(limit=typing.cast("int", 2.0)),
        Toy(mode=typing.cast("Any", "up")),
        Toy(careful=typing.cast("Any", None)),
    ],
)
def test_a_value_of_another_type_is_refused_where_it_is_printed(one: Toy) -> None:
    with pytest.raises(PipelineError, match="which no pipeline text gives back"):
        format_pass(one)


def test_no_budgets_where_some_are_needed_are_refused() -> None:
    with pytest.raises(PipelineError, match=r"option 'budgets' of assert-cost is \(\)"):
        format_pass(AssertCost(()))


# ---------------------------------------------------------------------------------------------------- any pipeline

WORDS = st.text(st.characters(exclude_characters=",{}", exclude_categories=("Z", "C")), min_size=1)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """What an option of type `kind` may be."""
    if typing.get_origin(kind) is tuple:
        return st.lists(BUDGETS, min_size=1, max_size=3).map(tuple)
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    known = {
        int: st.integers(),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: WORDS,
        type(None): st.none(),
    }
    return st.one_of(*(known[one] if one in known else values(one) for one in typing.get_args(kind) or (kind,)))


def passes(pass_class: type[Pass]) -> st.SearchStrategy[Pass]:
    """Passes of one class with any options, some of them left at their defaults."""
    if pass_class is PruneVocabulary:  # it wants one of its options and not the other, and `keep` is a file
        return st.builds(PruneVocabulary, top=st.integers(1, 1000))
    hints = typing.get_type_hints(pass_class)
    options = {}
    for field in dataclasses.fields(pass_class):
        options[field.name] = values(hints[field.name])
        if field.default is not dataclasses.MISSING:
            options[field.name] |= st.just(field.default)
    return st.builds(pass_class, **options)


CLASSES = [*(find_pass(name) for name in pass_names()), Toy]
SOURCE = [one for one in CLASSES if issubclass(one, SourceTransform)]
PROGRAM = [one for one in CLASSES if not issubclass(one, SourceTransform)]
PARTS = st.builds(
    lambda source, captures, program: Pipeline(tuple(source), captures, tuple(program)),
    st.lists(st.one_of(*map(passes, SOURCE)), max_size=4),
    st.just(True),
    st.lists(st.one_of(*map(passes, PROGRAM)), max_size=4),
)


@settings(deadline=None, derandomize=True)
@given(PARTS)
def test_every_pipeline_is_read_back_as_it_was_printed(whole: Pipeline) -> None:
    with patch.object(pipeline, "find_pass", lambda name: Toy if name == Toy.name else find_pass(name)):
        assert as_pipeline(str(whole)) == whole


@settings(deadline=None, derandomize=True)
@given(st.one_of(*map(passes, CLASSES)))
def test_a_pass_is_read_back_with_the_types_of_its_options(one: Pass) -> None:
    with patch.object(pipeline, "find_pass", lambda name: Toy if name == Toy.name else find_pass(name)):
        (again,) = as_pipeline(format_pass(one)).passes
    for name, value in vars(one).items():
        assert type(vars(again)[name]) is type(value)
