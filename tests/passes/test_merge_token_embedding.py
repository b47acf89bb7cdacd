"""`merge-token-embedding`: prefill takes tokens, and what pictures need stays."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from tests.compiler import tiny
from triptych.compiler.compose import compose
from triptych.compiler.manager import run_program
from triptych.compiler.model import OutputPort
from triptych.compiler.pass_kinds import MatchLog
from triptych.compiler.program import Program
from triptych.errors import PipelineError, VerificationError
from triptych.passes.merge_token_embedding import MergeTokenEmbedding
from triptych.testing import check_pass, default_model

GATHERS = torch.ops.aten.embedding.default


def calls(program: Program, method: str) -> int:
    return sum(node.target is GATHERS for node in program.methods[method].exported.graph.nodes)


def test_prefill_takes_tokens_and_the_method_before_it_goes() -> None:
    check = check_pass(MergeTokenEmbedding(), tiny.tiny(layers=2), matches=1)
    before, after = check.before, check.after
    assert isinstance(before, Program)
    assert isinstance(after, Program)
    assert (list(before.methods), list(after.methods)) == (
        ["token_embedding", "prefill", "decode"],
        ["prefill", "decode"],
    )
    assert [port.name for port in after.methods["prefill"].inputs] == ["tokens", "start_pos"]
    assert after.methods["decode"] is before.methods["decode"]
    assert [kind for *_, kind in after.graph.edges(data="kind") if kind == "feeds"] == []
    assert calls(after, "prefill") == calls(before, "prefill") + 1
    assert all(not any(label.startswith("embed@") for label in one.got.outputs) for one in check.traces)
    assert sum(one.nbytes for one in after.weights.values()) == sum(one.nbytes for one in before.weights.values())


@pytest.mark.parametrize("passes", ["", "last-token-logits"])
def test_a_quantized_table_is_merged_too(passes: str) -> None:
    after = f"quantize{{recipe=8da4w}},static-kv-cache,swap-sdpa,capture{',' if passes else ''}{passes}"
    check_pass(MergeTokenEmbedding(), tiny.tiny(layers=1), after=after, matches=1)


def test_decode_from_embeddings_is_merged_too() -> None:
    model = tiny.tiny(layers=1)
    prefill, decode = model.entry_points[1:]
    embeds = replace(prefill.inputs[0], shape=(1, 1, tiny.WIDTH))
    decode = replace(decode, forward=prefill.forward, inputs=(embeds, *prefill.inputs[1:]))
    source = replace(model, entry_points=(*model.entry_points[:2], decode))
    program = tiny.captured(source).program
    merged, (result,) = run_program(program, [MergeTokenEmbedding()])
    assert [match.where for match in result.matches] == ["prefill", "decode"]
    assert merged.methods["decode"].inputs[0].shape == (1, 1)
    wanted = tiny.captured(model).program.methods["decode"].exported.module()
    token, start = torch.tensor([[7]]), torch.tensor([0])
    with torch.no_grad():
        got = merged.methods["decode"].exported.module()(token, start)
        torch.testing.assert_close(got, wanted(token, start), rtol=1e-5, atol=1e-5)


def test_the_table_stays_where_one_method_is_left_to_it() -> None:
    model = tiny.tiny(layers=1)
    score = replace(model.entry_points[1], name="score", roles=frozenset())
    program = tiny.captured(replace(model, entry_points=(*model.entry_points, score))).program
    log = MatchLog(select=lambda number: number == 0)
    merged = MergeTokenEmbedding().rewrite(program, log)
    assert list(merged.methods) == ["token_embedding", "prefill", "decode", "score"]
    assert merged.methods["token_embedding"].outputs[0].links == ()
    assert [port.name for port in merged.methods["score"].inputs] == ["embeds", "start_pos"]


def test_a_prefill_that_pictures_feed_too_is_refused() -> None:
    reason = r"prefill: its embeds come from vision_encoder\.embeds too, so it must keep taking embeddings"
    with pytest.raises(PipelineError, match=reason):
        check_pass(MergeTokenEmbedding(), default_model(), matches=0)


def test_a_program_without_the_role_is_refused() -> None:
    model = tiny.tiny(layers=1)
    only_decode = replace(model, entry_points=(model.entry_points[2],))
    with pytest.raises(PipelineError, match="0 methods have the role token_embedding; expected one"):
        tiny.captured(only_decode).rewrite("merge-token-embedding")


def test_an_output_that_no_input_names_is_no_feed() -> None:
    model = tiny.with_entry_point(tiny.tiny(layers=1), "token_embedding", outputs=(OutputPort("embeds"),))
    assert list(tiny.captured(model).rewrite("merge-token-embedding").program.methods) == ["prefill", "decode"]


@dataclass(frozen=True)
class AddsOne(MergeTokenEmbedding):
    """Wrong: it looks up the tokens after the ones given."""

    name: ClassVar[str] = "adds-one"

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        def shifted(module: tiny.TinyModel, tokens: torch.Tensor) -> torch.Tensor:
            return module.embedding((tokens + 1) % tiny.VOCABULARY)

        model = tiny.with_entry_point(tiny.tiny(layers=1), "token_embedding", forward=shifted)
        wrong = tiny.captured(model).program.methods["token_embedding"]
        log.match("prefill")
        merged = compose(wrong, program.methods["prefill"], {"embeds": "embeds"})
        return program.with_methods({"prefill": merged, "decode": program.methods["decode"]})


def test_a_wrong_table_is_caught() -> None:
    with pytest.raises(VerificationError, match="after pass adds-one the model computes something else"):
        check_pass(AddsOne(), tiny.tiny(layers=1), matches=1)
