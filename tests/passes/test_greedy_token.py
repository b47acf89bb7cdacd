"""`greedy-token`: decode gives the most likely token, and the oracle still sees."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch

from tests.compiler import tiny
from triptych.compiler.editing import GraphEditor
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES
from triptych.compiler.program import Method, Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.trace import CallTrace, Step, TraceOutputs, compare
from triptych.compiler.trace_plans import make_plans, subject_of
from triptych.errors import PipelineError, VerificationError
from triptych.manifest import TensorSignature
from triptych.passes import greedy_token
from triptych.passes.greedy_token import GreedyToken
from triptych.testing import check_pass, default_model

FP32 = DEFAULT_TOLERANCES["float32"]
TRACE = CallTrace("two tokens", torch.zeros(2, dtype=torch.int64), (Step("prefill", 1), Step("decode", 1)))
LOGITS = torch.tensor([0.0, 5.0, 10.0, 9.0])


def chosen(logits: torch.Tensor, token: int) -> tuple[str, ...]:
    wanted = TraceOutputs({"prefill@1": LOGITS, "decode@2": logits}, {})
    got = TraceOutputs({"prefill@1": LOGITS, "decode@2": torch.tensor(token)}, {})
    return compare(TRACE, wanted, got, FP32).failures(FP32)


@pytest.mark.parametrize("passes", ["", ",last-token-logits"], ids=["all logits", "last logits"])
def test_decode_gives_one_token_and_prefill_keeps_its_logits(passes: str) -> None:
    after = f"static-kv-cache,swap-sdpa,capture{passes}"
    check = check_pass(GreedyToken(), tiny.tiny(layers=1), after=after, matches=1)
    program = check.after
    assert isinstance(program, Program)
    assert program.methods["decode"].outputs == (TensorSignature("token", "int64", (1, 1), ("sampler",)),)
    assert program.methods["prefill"].outputs[0].name == "logits"
    for one in check.traces:
        of_decode = [difference for difference in one.comparison.outputs if difference.label.startswith("decode@")]
        assert {difference.kl for difference in of_decode} == {None}
        assert {difference.greedy for difference in of_decode} == {True}


def test_on_a_model_that_sees_pictures() -> None:
    check_pass(GreedyToken(), default_model(), matches=1)


def test_a_quantized_model() -> None:
    check_pass(
        GreedyToken(), tiny.tiny(layers=1), after="quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture", matches=1
    )


def test_it_comes_after_what_looks_for_logits() -> None:
    with pytest.raises(PipelineError, match="greedy-token must come after last-token-logits"):
        tiny.captured(tiny.tiny(layers=1)).rewrite("greedy-token,last-token-logits")


def test_a_method_that_prefills_too_is_refused() -> None:
    program = tiny.captured(tiny.tiny(layers=1)).rewrite("merge-token-embedding").program
    prefill, decode = program.methods["prefill"], program.methods["decode"]
    both = replace(prefill, roles=prefill.roles | decode.roles)
    with pytest.raises(PipelineError, match="prefill: it has the role prefill too, whose logits are needed"):
        rewritten(program.with_methods({"prefill": both}))


def test_without_a_prefill_nothing_would_show_that_it_reacts() -> None:
    model = tiny.tiny(layers=1)
    with pytest.raises(PipelineError, match="decode: no method with the role prefill would be left that gives logits"):
        tiny.captured(replace(model, entry_points=(model.entry_points[2],))).rewrite("greedy-token")


def rewritten(program: Program) -> Program:
    from triptych.compiler.manager import run_program

    return run_program(program, [GreedyToken()])[0]


# ------------------------------------------------------------------------------------------------ the comparison


def test_the_token_of_the_largest_logit_passes_and_another_does_not() -> None:
    assert not chosen(LOGITS, 2)
    (failure,) = chosen(LOGITS, 3)
    assert failure.startswith("decode@2: relative 0.05, KL -, greedy differs")


@pytest.mark.parametrize("token", [-1, 4])
def test_a_token_outside_the_vocabulary_does_not_pass(token: int) -> None:
    assert chosen(LOGITS, token)


def test_a_near_tie_may_go_either_way_and_no_further() -> None:
    tie = torch.tensor([0.0, 9.9999, 10.0, 9.99])
    assert not chosen(tie, 1)
    assert chosen(tie, 3), "the third best is no part of the tie"
    (_, difference) = compare(
        TRACE,
        TraceOutputs({"prefill@1": LOGITS, "decode@2": tie}, {}),
        TraceOutputs({"prefill@1": LOGITS, "decode@2": torch.tensor(1)}, {}),
        FP32,
    ).outputs
    assert (difference.greedy, difference.near_tie) == (False, True)


def test_a_runner_that_ignores_its_inputs_is_seen_though_decode_gives_tokens_only() -> None:
    model = tiny.tiny(layers=1)
    program = tiny.captured(model).rewrite("greedy-token").program
    oracle = Oracle(model, make_plans(subject_of(model), 2, (5,)))
    honest = ProgramRunner(program)
    reports = list(oracle.judge(honest, honest.methods, perturbed=True))
    assert [one.passed for one in reports] == [True] * len(reports)

    class Deaf(ProgramRunner):
        """Hears no other first token than the one of the conversation it played last."""

        def run(self, method: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            if method == "token_embedding":
                tensors = {"tokens": torch.zeros_like(tensors["tokens"])}
            return super().run(method, **tensors)

    deaf = Deaf(program)
    seen = [one.unseen for one in oracle.judge(deaf, deaf.methods, perturbed=True)]
    assert all(any(text.startswith("artifact, ") for text in texts) for texts in seen)


@dataclass(frozen=True)
class SecondBest(GreedyToken):
    """Wrong: it chooses the token after the best."""

    name: ClassVar[str] = "second-best"


def test_a_wrong_choice_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = greedy_token._choosing

    def wrong(method: Method, index: int, made_by: str) -> Method:
        chosen = right(method, index, made_by)
        editor = GraphEditor(chosen.exported, made_by)
        token = editor.user_outputs[index]
        with editor.graph.inserting_before(editor.graph.output_node()):
            last: Any = editor.call(torch.ops.aten.clamp.default, token, 0, tiny.VOCABULARY - 2, like=token)
            following = editor.call(torch.ops.aten.add.Tensor, last, 1, like=token)
        editor.replace_user_output(index, following)
        return replace(chosen, exported=editor.finish())

    monkeypatch.setattr(greedy_token, "_choosing", wrong)
    with pytest.raises(VerificationError, match=r"after pass second-best .* decode@\d+: .*greedy differs"):
        check_pass(SecondBest(), tiny.tiny(layers=1), matches=1)
