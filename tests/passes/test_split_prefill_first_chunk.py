"""`split-prefill-first-chunk`: the first prefill attends to what it was given, and nothing of a past."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from tests.compiler import tiny, windowed
from triptych.compiler.cost import program_cost
from triptych.compiler.manager import run_program
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.errors import PipelineError, VerificationError
from triptych.passes import split_prefill_first_chunk
from triptych.passes.split_prefill_first_chunk import SplitPrefillFirstChunk
from triptych.testing import check_pass, default_model

OPERATORS = torch.ops.triptych
LENGTH = 8


def targets(program: Program, method: str) -> list[Any]:
    return [node.target for node in program.methods[method].exported.graph.nodes]


def test_a_method_for_position_0_stands_beside_prefill() -> None:
    check = check_pass(SplitPrefillFirstChunk(), tiny.tiny(layers=2), matches=2)
    before, after = check.before, check.after
    assert isinstance(before, Program)
    assert isinstance(after, Program)
    assert list(after.methods) == [*before.methods, "prefill_first"]
    first = after.methods["prefill_first"]
    assert [port.name for port in first.inputs] == ["embeds"]
    assert [str(role) for role in first.roles] == ["prefill_first"]
    assert after.methods["prefill"] is before.methods["prefill"]
    assert targets(after, "prefill_first").count(OPERATORS.update_cache.default) == 4, "the caches are still written"
    feeds = {(one, other) for one, other, kind in after.graph.edges(data="kind") if kind == "feeds"}
    assert ("method:token_embedding", "method:prefill_first") in feeds
    assert after.methods["token_embedding"].outputs[0].links == ("prefill.embeds", "prefill_first.embeds")


def test_no_weight_is_stored_again_and_no_state_is_new() -> None:
    before = tiny.captured(tiny.tiny(layers=1)).program
    after, _ = run_program(before, [SplitPrefillFirstChunk()])
    assert sum(one.nbytes for one in after.weights.values()) == sum(one.nbytes for one in before.weights.values())
    assert after.state.keys() == before.state.keys()
    assert all("prefill_first" in row.writers and "prefill_first" not in row.readers for row in after.state.values())


def test_attention_costs_what_the_fresh_positions_cost() -> None:
    program = tiny.captured(tiny.tiny(layers=2)).rewrite("split-prefill-first-chunk").program
    cost = program_cost(program, {"S": LENGTH})
    slots_saved = tiny.CONTEXT_LENGTH - LENGTH
    per_layer = 2 * 2 * LENGTH * slots_saved * tiny.WIDTH  # queries by keys, and weights by values
    assert cost["prefill"].flops - cost["prefill_first"].flops == 2 * per_layer


@pytest.mark.parametrize("passes", ["", "last-token-logits,merge-token-embedding"])
def test_quantized_and_merged_programs(passes: str) -> None:
    after = f"quantize{{recipe=8da4w}},static-kv-cache,swap-sdpa,capture{',' if passes else ''}{passes}"
    check_pass(SplitPrefillFirstChunk(), tiny.tiny(layers=1), after=after, matches=1)


def test_a_model_that_sees_pictures() -> None:
    check_pass(SplitPrefillFirstChunk(), default_model(), matches=4)


@pytest.mark.parametrize("caches", ["static-kv-cache", "ring-kv-cache"])
def test_sliding_windows_stay_windows(caches: str) -> None:
    model = windowed.gemma3()
    check = check_pass(
        SplitPrefillFirstChunk(),
        model,
        after=f"{caches},swap-sdpa,capture",
        matches=windowed.LAYERS,
        oracle=windowed.oracle(model),
    )
    assert isinstance(check.after, Program)
    calls = [
        node
        for node in check.after.methods["prefill_first"].exported.graph.nodes
        if node.target is OPERATORS.cached_sdpa.default
    ]
    assert [node.kwargs.get("window") for node in calls] == [windowed.WINDOW] * 5 + [None]


def test_what_the_cache_held_before_is_not_seen() -> None:
    program = tiny.captured(tiny.tiny(layers=2)).rewrite("split-prefill-first-chunk").program
    runner = ProgramRunner(program)
    embeds = torch.randn(1, 5, tiny.WIDTH)
    outputs = []
    for filling in (0.0, 3.0):
        for row in runner.state.values():
            row.fill_(filling)
        outputs.append(runner.run("prefill_first", embeds=embeds)["logits"])
    wanted = tiny.tiny(layers=2).module.logits(embeds, torch.arange(5))  # type: ignore[operator]
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], wanted.detach(), rtol=1e-5, atol=1e-5)


def test_legalized_to_aten_it_is_plain_causal_attention() -> None:
    program = tiny.captured(tiny.tiny(layers=1)).rewrite("split-prefill-first-chunk,legalize-aten").program
    attention = torch.ops.aten.scaled_dot_product_attention.default
    for name, causal in (("prefill", False), ("prefill_first", True)):
        (node,) = (one for one in program.methods[name].exported.graph.nodes if one.target is attention)
        mask, is_causal = ([*node.args, None, 0.0, False][index] for index in (3, 5))
        assert (node.kwargs.get("is_causal", is_causal), node.kwargs.get("attn_mask", mask) is None) == (causal, causal)


# ------------------------------------------------------------------------------------------------ what it leaves alone


def test_attention_spelled_in_aten_is_refused() -> None:
    with pytest.raises(
        PipelineError, match="prefill: no operator in it is attention over a cache; put swap-sdpa before"
    ):
        tiny.captured(tiny.tiny(layers=1), "static-kv-cache").rewrite("split-prefill-first-chunk")


def test_a_second_time_is_refused() -> None:
    with pytest.raises(PipelineError, match="the program: it has a method prefill_first"):
        tiny.captured(tiny.tiny(layers=1)).rewrite("split-prefill-first-chunk,split-prefill-first-chunk")


def test_several_prefills_are_refused() -> None:
    model = tiny.tiny(layers=1)
    second = replace(model.entry_points[1], name="again")
    with pytest.raises(PipelineError, match="2 methods have the role prefill; expected one"):
        tiny.captured(replace(model, entry_points=(*model.entry_points, second))).rewrite("split-prefill-first-chunk")


def test_another_abi_is_refused() -> None:
    program = tiny.captured(tiny.tiny(layers=1)).program
    other = Program.build(program.methods, replace(program.metadata, abi="other/1"))
    with pytest.raises(PipelineError, match="it keeps the ABI other/1, which has no such method"):
        run_program(other, [SplitPrefillFirstChunk()])


def test_without_a_cache_there_is_nothing_to_split() -> None:
    with pytest.raises(PipelineError, match="requires kv-cache"):
        tiny.captured(tiny.tiny(layers=1), "").rewrite("split-prefill-first-chunk")


def test_rows_that_something_else_writes_too_are_read() -> None:
    def twice(module: Any, embeds: torch.Tensor, start_pos: torch.Tensor) -> torch.Tensor:
        logits = tiny.prefill(module, embeds, start_pos)
        routed = getattr(module.blocks[0].attention, "routed_attention", None)
        if routed is not None:  # the cache is there once the pass that adds it has run
            routed.cache.keys.mul_(1.0)
        return logits

    model = tiny.with_entry_point(tiny.tiny(layers=1), "prefill", forward=twice)
    with pytest.raises(PipelineError, match="is not written by one update_cache alone"):
        tiny.captured(model).rewrite("split-prefill-first-chunk")


# ------------------------------------------------------------------------------------------------ a wrong one


@dataclass(frozen=True)
class SwapsKeysAndValues(SplitPrefillFirstChunk):
    """Wrong: it attends to the values and returns the keys."""

    name: ClassVar[str] = "swaps-keys-and-values"


def test_a_wrong_first_method_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = split_prefill_first_chunk._over_fresh

    def wrong(node: torch.fx.Node) -> Any:
        given = right(node)
        return {**given, "key": given["value"], "value": given["key"]} if isinstance(given, dict) else given

    monkeypatch.setattr(split_prefill_first_chunk, "_over_fresh", wrong)
    with pytest.raises(VerificationError, match="after pass swaps-keys-and-values the model computes something else"):
        check_pass(SwapsKeysAndValues(), tiny.tiny(layers=1), matches=1)


def test_a_wrong_zero_is_refused_by_the_verifier() -> None:
    program = tiny.captured(tiny.tiny(layers=1)).program
    wrong = replace(program.methods["prefill"], roles=frozenset({split_prefill_first_chunk.PREFILL_FIRST}))
    from triptych.compiler.verifier import verify

    with pytest.raises(
        VerificationError, match="role prefill_first begins at position 0, and the method takes a start_pos"
    ):
        verify(program.with_methods({**program.methods, "wrong": wrong}))
