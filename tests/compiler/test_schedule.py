"""Scheduling: declarations decide, the given order decides the rest, contradictions are explained."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest

from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import GraphPass, MatchLog, Pass, ProgramPass, SourceTransform
from triptych.compiler.pipeline import Pipeline, parse
from triptych.compiler.program import Method, Program
from triptych.compiler.properties import KV_CACHE, LAST_TOKEN_LOGITS, Property
from triptych.compiler.schedule import schedule
from triptych.errors import PipelineError
from triptych.passes.last_token_logits import LastTokenLogits
from triptych.passes.static_kv_cache import StaticKVCachePass
from triptych.passes.swap_sdpa import SwapSDPA

OTHER = Property("other")
CLEAN = Property("clean")


class _Source(SourceTransform):
    def transform(self, model: Model, log: MatchLog) -> Model:
        return model


class _Graph(GraphPass):
    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        pass


class _Program(ProgramPass):
    def rewrite(self, program: Program, log: MatchLog) -> Program:
        return program


def make(
    name: str,
    base: type[Pass] = _Graph,
    *,
    after: str = "",
    before: str = "",
    requires: tuple[Property, ...] = (),
    ensures: tuple[Property, ...] = (),
) -> Pass:
    """Return a pass with these declarations; `after` and `before` are names with spaces between them."""
    declared = {
        "name": name,
        "after": frozenset(after.split()),
        "before": frozenset(before.split()),
        "requires": frozenset(requires),
        "ensures": frozenset(ensures),
    }
    return dataclass(frozen=True)(type(name, (base,), declared))()


def names(pipeline: Pipeline) -> str:
    return " ".join(one.name for one in pipeline.passes)


# ---------------------------------------------------------------------------------------------------- orders


def test_the_passes_of_the_default_pipeline_have_one_order() -> None:
    expected = parse("static-kv-cache{max=8},swap-sdpa,capture,last-token-logits")
    given = [StaticKVCachePass(max=8), SwapSDPA(), LastTokenLogits()]
    for permutation in itertools.permutations(given):
        assert schedule(permutation) == expected


@pytest.mark.parametrize("order", ["a b c", "c b a", "b a c"])
def test_passes_that_declare_nothing_keep_their_order(order: str) -> None:
    assert names(schedule(make(name) for name in order.split())) == order


def test_names_in_after_and_before_decide() -> None:
    passes = [make("a", after="c"), make("b"), make("c"), make("d", before="b")]
    assert names(schedule(passes)) == "c a d b"


def test_names_of_passes_that_are_not_there_mean_nothing() -> None:
    assert names(schedule([make("a", after="x"), make("b", before="y")])) == "a b"


def test_who_ensures_comes_before_who_requires() -> None:
    passes = [make("user", requires=(OTHER,)), make("between"), make("maker", ensures=(OTHER,))]
    assert names(schedule(passes)) == "between maker user"


def test_all_who_ensure_a_property_come_first() -> None:
    passes = [make("first", ensures=(OTHER,)), make("user", requires=(OTHER,)), make("second", ensures=(OTHER,))]
    assert names(schedule(passes)) == "first second user"


def test_who_keeps_a_property_up_comes_after_who_makes_it() -> None:
    keeper = {"requires": (OTHER,), "ensures": (OTHER,)}
    passes = [make("one", **keeper), make("two", **keeper), make("maker", ensures=(OTHER,))]
    assert names(schedule(passes)) == "maker one two"


def test_source_transforms_come_before_capture_and_the_rest_after() -> None:
    pipeline = schedule([make("g"), make("s", _Source), make("p", _Program), make("t", _Source)])
    assert names(pipeline) == "s t g p"
    assert [one.name for one in pipeline.source] == ["s", "t"]
    assert pipeline.captures


def test_a_property_of_the_module_serves_a_pass_over_the_program() -> None:
    assert names(schedule([make("g", requires=(KV_CACHE,)), make("s", _Source, ensures=(KV_CACHE,))])) == "s g"


def test_capture_stands_where_a_captured_program_is_needed() -> None:
    assert not schedule([make("s", _Source)]).captures
    assert schedule([make("g")]).captures
    assert schedule([make("p", _Program)]).captures
    assert schedule([]) == Pipeline()


def test_one_pass_may_come_twice() -> None:
    twice = make("check")
    assert names(schedule([twice, make("a", before="check"), twice])) == "a check check"


# ---------------------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("passes", "edges"),
    [
        (
            [make("a", requires=(OTHER,)), make("b", after="a", ensures=(OTHER,))],
            {"a must come before b (b.after)", "b before a (ensures other, which a requires)"},
        ),
        (
            [make("a", before="b"), make("b", before="c"), make("c", before="a")],
            {"a must come before b (a.before)", "b before c (b.before)", "c before a (c.before)"},
        ),
        (
            [make("s", _Source, after="g"), make("g")],
            {"s must come before g (s changes the module, g the captured program)", "g before s (s.after)"},
        ),
    ],
)
def test_a_contradiction_is_explained_edge_by_edge(passes: list[Pass], edges: set[str]) -> None:
    with pytest.raises(PipelineError) as caught:
        schedule(passes)
    message = str(caught.value)
    prefix, suffix = "the passes have no order: ", "; leave one out or change what it declares"
    assert message.startswith(prefix)
    assert message.endswith(suffix)
    assert rotations(message.removeprefix(prefix).removesuffix(suffix)) & {frozenset(edges)}


def rotations(explanation: str) -> set[frozenset[str]]:
    """A cycle may be told from any of its passes: return its edges with "must come" at each in turn."""
    edges = [edge.replace("must come before", "before") for edge in explanation.replace("), ", ")\n").split("\n")]
    return {
        frozenset(edge.replace(" before ", " must come before ") if edge is first else edge for edge in edges)
        for first in edges
    }


def test_passes_outside_the_cycle_are_not_blamed() -> None:
    passes = [make("innocent"), make("a", after="b innocent"), make("b", after="a"), make("late", after="a")]
    with pytest.raises(PipelineError) as caught:
        schedule(passes)
    assert "innocent" not in str(caught.value)
    assert "late" not in str(caught.value)


def test_a_property_that_nobody_ensures_names_pass_and_property() -> None:
    with pytest.raises(PipelineError, match="swap-sdpa requires kv-cache, which none of the passes ensures; add one"):
        schedule([SwapSDPA(), LastTokenLogits()])


def test_keeping_a_property_up_is_not_making_it() -> None:
    passes = [make("keeper", requires=(CLEAN,), ensures=(CLEAN,)), make("user", requires=(CLEAN,))]
    with pytest.raises(PipelineError, match="keeper requires clean, which none of the passes ensures"):
        schedule(passes)


def test_properties_are_known_by_name() -> None:
    passes = [make("user", requires=(Property("last-token-logits"),)), make("maker", ensures=(LAST_TOKEN_LOGITS,))]
    assert names(schedule(passes)) == "maker user"
