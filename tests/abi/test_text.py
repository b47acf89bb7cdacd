"""`TextLLMRunner` of ExecuTorch over programs with the ABI `executorch-llm`: the same tokens as the eager model."""

from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tokenizers import Tokenizer

import triptych
from tests.abi.conftest import Export
from tests.abi.executorch_runner import Answer, Request, answers, run
from tests.abi.models import EOS_IDS, greedy, tokens_of
from tests.compiler import tiny
from triptych.compiler.model import Model
from triptych.verification import verify

PROMPTS: Final = ("hello", "a", "abcdefghijklmnop")
TOO_LONG: Final = "a" * tiny.CONTEXT_LENGTH
LONGEST: Final = "a" * (tiny.CONTEXT_LENGTH - 1)


@pytest.fixture(scope="module")
def answered(tiny_pte: Path) -> dict[str, Answer]:
    """What one runner makes of these prompts in this order, each until the end of text or of the context."""
    prompts = (*PROMPTS[:1], TOO_LONG, *PROMPTS[1:], LONGEST)
    return dict(zip(prompts, answers("text", tiny_pte, [Request((one,), -1) for one in prompts]), strict=True))


def pieces(model: Model, tokens: list[int]) -> list[str]:
    tokenizer = Tokenizer.from_file(str(model.tokenizer_file))
    return [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]


def test_the_tokens_are_those_of_the_eager_model(answered: dict[str, Answer], tiny_model: Model) -> None:
    expected = {prompt: pieces(tiny_model, greedy(tiny_model, tokens_of(tiny_model, prompt))) for prompt in PROMPTS}
    assert len({str(one) for one in expected.values()}) == len(PROMPTS), "the prompt must matter"
    assert {prompt: list(answered[prompt].pieces) for prompt in PROMPTS} == expected


def test_it_ends_at_each_end_of_text_id_and_at_the_context(answered: dict[str, Answer], tiny_model: Model) -> None:
    """The tokenizer file names no end of text; the program does. The runner hands the end over like any token."""
    first, second = pieces(tiny_model, list(EOS_IDS))
    assert [answered[prompt].pieces[-1] for prompt in PROMPTS[:2]] == [first, second]
    full = answered[PROMPTS[2]]
    assert not {first, second} & {*full.pieces}
    assert len(PROMPTS[2]) + len(full.pieces) == tiny.CONTEXT_LENGTH


def test_a_prompt_is_taken_in_by_one_call(answered: dict[str, Answer]) -> None:
    """Without ``enable_dynamic_shape`` and ``get_max_seq_len`` the runner would go token by token, or in chunks."""
    assert [(answered[one].prompt_tokens, answered[one].prefill_calls) for one in (*PROMPTS, LONGEST)] == [
        (5, 1), (1, 1), (16, 1), (23, 1),
    ]  # fmt: skip


def test_a_prompt_past_the_context_is_an_error_and_the_runner_goes_on(
    answered: dict[str, Answer], tiny_model: Model
) -> None:
    refused = answered[TOO_LONG]
    assert (refused.error, refused.pieces) == ("Generation failed", ())
    assert "num_prompt_tokens 24 >= max_context_len 24" in refused.log
    assert answered["a"].error is None
    last = answered[LONGEST]
    assert list(last.pieces) == pieces(tiny_model, greedy(tiny_model, tokens_of(tiny_model, LONGEST)))


def test_our_runtime_runs_the_same_file(tiny_pte: Path, tiny_model: Model) -> None:
    expected = greedy(tiny_model, tokens_of(tiny_model, PROMPTS[2]))
    with triptych.load(tiny_pte) as runner:
        assert list(runner.generate(PROMPTS[2], max_new_tokens=len(expected)).tokens) == expected


def test_parity_of_the_emitted_file(tiny_pte: Path, tiny_model: Model) -> None:
    report = verify(tiny_pte, tiny_model, tokens=4)
    assert report.passed, [(one.trace, one.failures, one.unseen) for one in report.traces]
    assert all(one.comparison.outputs and one.comparison.state for one in report.traces)


def test_the_abi_triptych_is_not_what_the_runner_takes(tiny_model: Model, export_for_runners: Export) -> None:
    artifact = export_for_runners("tiny", tiny_model, abi="triptych")
    outcome = run("text", artifact, [Request(("hello",), 2)])
    assert outcome.code == 1
    assert not outcome.answers
    assert "get_max_seq_len" in outcome.log


# ---------------------------------------------------------------------------------------------------- SmolLM2, cut


@pytest.mark.slow
def test_four_layers_of_smollm2_generate_what_transformers_does(smollm2_cut_pte: Path, smollm2_cut: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_cut)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_cut, dtype=torch.float32).eval()
    question = [{"role": "user", "content": "What is the capital of Italy?"}]
    chat = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    prompts = (chat, "A ship left the harbour at dawn. " * 40)
    requests = [Request((prompt,), 24) for prompt in prompts]
    for prompt, answer in zip(prompts, answers("text", smollm2_cut_pte, requests), strict=True):
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.inference_mode():
            generated = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert (answer.prompt_tokens, answer.prefill_calls) == (ids.shape[1], 1)
        assert list(answer.pieces) == [tokenizer.decode([token]) for token in generated.tolist()]
