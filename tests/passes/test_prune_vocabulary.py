"""`prune-vocabulary`: rows go, ids stay, and what was not kept is never drawn."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler import tiny
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.trace import CallTrace, Step, TraceOutputs, compare
from triptych.errors import PipelineError, VerificationError
from triptych.manifest import token_ids, token_text
from triptych.passes import prune_vocabulary
from triptych.passes.prune_vocabulary import PruneVocabulary
from triptych.testing import check_pass, default_model

FP32 = DEFAULT_TOLERANCES["float32"]
KEPT = 20
PLACES = 4  # the table in token_embedding and decode, the projection in prefill and decode


def weight_bytes(program: Program) -> int:
    return sum(one.nbytes for one in program.weights.values())


def pruned(model: Model, passes: str = "") -> Program:
    return tiny.captured(model).rewrite(f"{passes}prune-vocabulary{{top={KEPT}}}").program


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_other_tokens_leave_the_weights(tied: bool) -> None:
    model = tiny.tiny(layers=1, tied=tied)
    check = check_pass(
        PruneVocabulary(top=KEPT), model, after="static-kv-cache,swap-sdpa,capture,last-token-logits", matches=PLACES
    )
    assert isinstance(check.before, Program)
    assert isinstance(check.after, Program)
    row, tables = tiny.WIDTH * 4, 1 if tied else 2
    saved = tables * (tiny.VOCABULARY - KEPT) * row - tiny.VOCABULARY * 4  # the table of rows is int32
    assert weight_bytes(check.before) - weight_bytes(check.after) == saved
    assert check.after.metadata.kept_tokens == f"0-{KEPT - 1}"
    sliced = [one for one in check.after.weights.values() if one.key.endswith(".kept")]
    assert len(sliced) == tables
    assert {"prefill", "decode"} <= set(sliced[-1].users)


def test_a_quantized_vocabulary_loses_rows_with_their_scales() -> None:
    after = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture,last-token-logits"
    check = check_pass(PruneVocabulary(top=KEPT), tiny.tiny(layers=1), after=after, matches=PLACES)
    assert isinstance(check.after, Program)
    kept = {one.key: one.uses[0].tensor for one in check.after.weights.values() if one.key.endswith(".kept")}
    assert len(kept) == 6
    assert {tensor.shape[0] for tensor in kept.values()} == {KEPT}


def test_the_last_logits_are_needed_of_no_one() -> None:
    program = pruned(tiny.tiny(layers=1))
    assert [port.shape[-1] for port in program.methods["prefill"].outputs] == [tiny.VOCABULARY]


def test_on_a_model_that_sees_pictures_what_stands_around_them_stays() -> None:
    model = default_model()
    image = model.metadata.image
    assert image is not None
    check = check_pass(
        PruneVocabulary(top=300), model, after="static-kv-cache,swap-sdpa,capture,last-token-logits", matches=PLACES
    )
    assert isinstance(check.after, Program)
    kept = token_ids(check.after.metadata.kept_tokens or "")
    assert {image.token_id, *image.prefix, *image.suffix, *model.metadata.eos_ids} <= set(kept)


def test_kept_tokens_have_their_logits_and_others_the_least_number() -> None:
    program = pruned(tiny.tiny(layers=1), "last-token-logits,")
    runner, whole = ProgramRunner(program), tiny.tiny(layers=1).module
    tokens = torch.tensor([[3, 19, 7]])
    embeds = runner.run("token_embedding", tokens=tokens)["embeds"]
    logits = runner.run("prefill", embeds=embeds, start_pos=torch.tensor([0]))["logits"][0]
    with torch.no_grad():
        wanted = whole(tokens)[0, -1]
    torch.testing.assert_close(logits[:KEPT], wanted[:KEPT], rtol=1e-5, atol=1e-5)
    assert set(logits[KEPT:].tolist()) == {torch.finfo(torch.float32).min}


def test_a_token_that_was_not_kept_has_no_row() -> None:
    runner = ProgramRunner(pruned(tiny.tiny(layers=1)))
    with pytest.raises(VerificationError, match=r"token_embedding fails .*index out of range"):
        runner.run("token_embedding", tokens=torch.tensor([[KEPT]]))


def test_special_tokens_stay_and_a_file_may_list_any(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("40-42, 17\n 5\n", encoding="utf-8")
    model = tiny.tiny(layers=1)
    model = replace(model, metadata=replace(model.metadata, bos_id=2, special_ids=(9, 1000)))
    program = tiny.captured(model).rewrite(f"prune-vocabulary{{keep={path}}}").program
    assert program.metadata.kept_tokens == "1-2,5,9,17,40-42"


def test_scaled_and_capped_logits_are_pruned_before_they_are_scaled() -> None:
    program = pruned(tiny.with_entry_point(tiny.tiny(layers=1), "prefill", forward=_capped))
    (projection,) = (
        node for node in program.methods["prefill"].exported.graph.nodes if node.target is torch.ops.aten.tanh.default
    )
    assert projection.meta["val"].shape[-1] == KEPT


def _capped(module: Any, embeds: Tensor, start_pos: Tensor) -> Tensor:
    return 3 * torch.tanh(tiny.prefill(module, embeds, start_pos) / 3)


# ------------------------------------------------------------------------------------------------ refused


def _softmaxed(module: Any, embeds: Tensor, start_pos: Tensor) -> Tensor:
    return tiny.prefill(module, embeds, start_pos).softmax(-1)


def _by_matmul(module: Any, embeds: Tensor, start_pos: Tensor) -> Tensor:
    x = embeds + module.positions(torch.arange(embeds.shape[1]) + start_pos)
    for block in module.blocks:
        x = block(x)
    return torch.matmul(module.norm(x), module.head.weight.t())


def _shifted(module: Any, tokens: Tensor) -> Tensor:
    return module.embedding((tokens + 1) % tiny.VOCABULARY)


def _scaled_table(module: Any, tokens: Tensor) -> Tensor:
    return torch.nn.functional.embedding(tokens, module.embedding.weight * 2)


REFUSED: dict[str, tuple[str, Callable[..., Tensor], str]] = {
    "softmax": (
        "prefill",
        _softmaxed,
        r"softmax .*stands behind the projection; only what treats each logit alike may",
    ),
    "no linear": ("prefill", _by_matmul, r"matmul.* stands behind the projection"),
    "computed ids": ("token_embedding", _shifted, "its indices are computed from tokens, and what they become"),
    "computed table": (
        "token_embedding",
        _scaled_table,
        r"its table is computed by aten\.mul\.Tensor; rows can be taken",
    ),
}


@pytest.mark.parametrize(("method", "forward", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_sliced_leaves_everything_as_it_is(
    method: str, forward: Callable[..., Tensor], reason: str
) -> None:
    with pytest.raises(PipelineError, match=reason):
        pruned(tiny.with_entry_point(tiny.tiny(layers=1), method, forward=forward))


def test_pruning_twice_or_not_at_all_is_refused() -> None:
    with pytest.raises(PipelineError, match="the program: it was pruned before"):
        pruned(tiny.tiny(layers=1), "prune-vocabulary{top=30},")
    with pytest.raises(PipelineError, match="the program: every token is to be kept"):
        tiny.captured(tiny.tiny(layers=1)).rewrite("prune-vocabulary{top=100}")


def test_options_that_mean_nothing_fail_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "ids.txt"
    path.write_text("5 48", encoding="utf-8")
    captured = tiny.captured(tiny.tiny(layers=1))
    for text, message in {
        "prune-vocabulary": "needs keep=FILE or top=N, and not both",
        f"prune-vocabulary{{top=3,keep={path}}}": "needs keep=FILE or top=N, and not both",
        "prune-vocabulary{top=0}": "top is 0; expected at least 1",
        f"prune-vocabulary{{keep={tmp_path}/none.txt}}": r"none\.txt cannot be read",
        f"prune-vocabulary{{keep={path}}}": r"ids\.txt lists token 48; the vocabulary has 0 to 47",
    }.items():
        with pytest.raises(PipelineError, match=message):
            captured.rewrite(text)
    path.write_text("five", encoding="utf-8")
    with pytest.raises(PipelineError, match=r"ids\.txt is no list of token ids .*; expected numbers and ranges"):
        PruneVocabulary(keep=str(path))


def test_tokens_are_chosen_after_pruning() -> None:
    with pytest.raises(PipelineError, match="prune-vocabulary must come before greedy-token"):
        tiny.captured(tiny.tiny(layers=1)).rewrite("greedy-token,prune-vocabulary{top=20}")
    check_pass(PruneVocabulary(top=KEPT), tiny.tiny(layers=1), matches=PLACES)


# ------------------------------------------------------------------------------------------------ the comparison


def test_the_text_of_ids_reads_back() -> None:
    assert token_text([7, 3, 4, 5, 9, 9]) == "3-5,7,9"
    assert token_ids("3-5,7,9") == [3, 4, 5, 7, 9]


TRACE = CallTrace("one token", torch.zeros(1, dtype=torch.int64), (Step("prefill", 1),))
WANTED = TraceOutputs({"prefill@1": torch.tensor([1.0, 4.0, 9.0, 2.0])}, {})
LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("logits", "passes"),
    [
        ([1.0, 4.0, LEAST, 2.0], True),
        ([1.0, 4.0, 0.0, 2.0], True),
        ([1.0, 4.0, 9.0, 2.0], False),
        ([1.0, 4.0, 1.0, 2.0], False),
        ([1.0, 4.2, LEAST, 2.0], False),
        ([1.0, 4.0, LEAST], False),
        ([1.0, 4.0, float("nan"), 2.0], False),
    ],
)
def test_kept_logits_are_compared_and_others_must_lie_below(logits: list[float], passes: bool) -> None:
    got = TraceOutputs({"prefill@1": torch.tensor(logits)}, {})
    kept = torch.tensor([0, 1, 3])
    assert (not compare(TRACE, WANTED, got, FP32, kept).failures(FP32)) == passes


@pytest.mark.parametrize(("token", "passes"), [(1, True), (2, False), (3, False)])
def test_a_chosen_token_is_the_best_of_the_kept(token: int, passes: bool) -> None:
    got = TraceOutputs({"prefill@1": torch.tensor(token)}, {})
    assert (not compare(TRACE, WANTED, got, FP32, torch.tensor([0, 1, 3])).failures(FP32)) == passes


def test_pruned_logits_that_can_be_drawn_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(logits: Tensor, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(logits, (0, 1)).index_select(logits.dim() - 1, rows)

    monkeypatch.setattr(prune_vocabulary, "_in_place_of_all", zeros)
    with pytest.raises(VerificationError, match=r"after pass prune-vocabulary .*: prefill@\d+: relative nan"):
        check_pass(PruneVocabulary(top=KEPT), tiny.tiny(layers=1), matches=PLACES)
