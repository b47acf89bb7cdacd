"""The oracle itself: `compare` must flag each kind of fault, and a comparison that cannot see must say so."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from triptych import verification
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES, Tolerance
from triptych.compiler.stages import Source
from triptych.compiler.trace import CallTrace, Sensitivity, Step, TraceOutputs, compare, perturbations, reference
from triptych.errors import ModelError, UsageError

FP32 = DEFAULT_TOLERANCES["float32"]
TRACE = tiny.trace(("prefill", 6), ("decode", 3), ("prefill", 4), ("decode", 2))
KEYS = "blocks.0.attention.routed_attention.cache.keys"


@pytest.fixture(scope="module")
def wanted() -> TraceOutputs:
    return reference(tiny.tiny(), TRACE)


def changed(outputs: TraceOutputs, part: str, name: str, change: Callable[[Tensor], Tensor]) -> TraceOutputs:
    table = {**getattr(outputs, part), name: change(getattr(outputs, part)[name].clone())}
    return replace(outputs, **{part: table})


def failures(wanted: TraceOutputs, got: TraceOutputs) -> tuple[str, ...]:
    return compare(TRACE, wanted, got, FP32).failures(FP32)


def with_value(index: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor[index] = value
        return tensor

    return change


def test_the_reference_is_every_call_of_the_trace(wanted: TraceOutputs) -> None:
    assert list(wanted.outputs) == [
        "embed@0", "prefill@6", "decode@7", "decode@8", "decode@9", "embed@9", "prefill@13", "decode@14", "decode@15",
    ]  # fmt: skip
    assert len(wanted.state) == 4
    assert {tuple(row.shape) for row in wanted.state.values()} == {(1, 15, 2, 16)}


def test_the_reference_is_the_modules_own_forward(wanted: TraceOutputs) -> None:
    with torch.no_grad():
        logits = tiny.tiny().module(TRACE.tokens.unsqueeze(0))[0]
    torch.testing.assert_close(wanted.outputs["decode@8"], logits[7], rtol=0, atol=0)
    torch.testing.assert_close(wanted.last_logits, logits[-1], rtol=0, atol=0)


def test_equal_outputs_have_no_failures(wanted: TraceOutputs) -> None:
    assert not failures(wanted, wanted)


FAULTS: dict[str, tuple[str, str, Callable[[Tensor], Tensor]]] = {
    "a NaN among the logits": ("outputs", "decode@8", with_value((3,), float("nan"))),
    "an infinity among the logits": ("outputs", "prefill@13", with_value((3,), float("inf"))),
    "a NaN in the state": ("state", KEYS, with_value((0, 4, 1, 2), float("nan"))),
    "logits scaled by 1.001": ("outputs", "decode@14", lambda logits: logits * 1.001),
    "logits moved by a constant": ("outputs", "decode@14", lambda logits: logits + 0.5),
    "the logits of another position": ("outputs", "decode@14", lambda logits: logits.roll(1)),
    "one wrong embedding": ("outputs", "embed@9", with_value((2, 5), 9.0)),
    "one wrong state slot": ("state", KEYS, lambda row: torch.cat([row[:, :7], row[:, 6:7], row[:, 8:]], dim=1)),
    "one empty state slot": ("state", KEYS, with_value((0, 7), 0.0)),
    "a state row shifted by a slot": ("state", KEYS, lambda row: row.roll(1, dims=1)),
    "a state row cut short": ("state", KEYS, lambda row: row[:, :-1]),
    "logits with another vocabulary": ("outputs", "decode@14", lambda logits: logits[:-1]),
}


@pytest.mark.parametrize(("part", "name", "fault"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_flagged_and_named(
    wanted: TraceOutputs, part: str, name: str, fault: Callable[[Tensor], Tensor]
) -> None:
    found = failures(wanted, changed(wanted, part, name, fault))
    assert len(found) == 1
    assert found[0].startswith(f"{name}:")


@pytest.mark.parametrize("name", ["prefill@6", "decode@15", "embed@0"])
def test_a_missing_output_is_flagged(wanted: TraceOutputs, name: str) -> None:
    got = replace(wanted, outputs={label: value for label, value in wanted.outputs.items() if label != name})
    assert failures(wanted, got) == (f"{name}: no counterpart to compare with",)


def test_an_extra_output_is_flagged(wanted: TraceOutputs) -> None:
    got = replace(wanted, outputs={**wanted.outputs, "decode@99": torch.zeros(48)})
    assert failures(wanted, got) == ("decode@99: no counterpart to compare with",)


def test_a_state_row_of_another_name_is_flagged(wanted: TraceOutputs) -> None:
    got = replace(wanted, state={**wanted.state, "elsewhere.keys": wanted.state[KEYS]})
    assert failures(wanted, got) == ("elsewhere.keys: no counterpart to compare with",)


def test_another_greedy_token_is_flagged_however_small_the_difference() -> None:
    trace = CallTrace("two tokens", torch.zeros(1, dtype=torch.int64), (Step("prefill", 1),))
    wanted = TraceOutputs({"prefill@1": torch.tensor([10.0, 9.0, 0.0])}, {})
    got = TraceOutputs({"prefill@1": torch.tensor([9.0, 10.0, 0.0])}, {})
    loose = Tolerance(relative=0.2, kl=10.0)
    (one,) = compare(trace, wanted, got, Tolerance(relative=0.01, kl=10.0)).outputs
    assert (one.greedy, one.near_tie) == (False, False)
    assert not one.within(loose)


def test_a_near_tie_forgives_another_greedy_token_and_is_counted() -> None:
    trace = CallTrace("two tokens", torch.zeros(1, dtype=torch.int64), (Step("prefill", 1),))
    wanted = TraceOutputs({"prefill@1": torch.tensor([10.0, 9.9999, 0.0])}, {})
    got = TraceOutputs({"prefill@1": torch.tensor([9.9999, 10.0, 0.0])}, {})
    (one,) = compare(trace, wanted, got, FP32).outputs
    assert (one.greedy, one.near_tie) == (False, True)
    assert one.within(replace(FP32, kl=1.0))


def test_the_worst_failure_comes_first(wanted: TraceOutputs) -> None:
    got = changed(wanted, "outputs", "decode@8", lambda logits: logits * 1.01)
    got = changed(got, "outputs", "decode@9", lambda logits: logits * 2)
    assert [one.partition(":")[0] for one in failures(wanted, got)] == ["decode@9", "decode@8"]


def test_keys_repeated_for_grouped_queries_compare_with_one_of_each() -> None:
    row = torch.randn(1, 5, 2, 4)
    repeated = TraceOutputs({}, {"keys": row.repeat_interleave(3, dim=2)})
    assert not compare(TRACE, repeated, TraceOutputs({}, {"keys": row}), FP32).failures(FP32)
    assert compare(TRACE, repeated, TraceOutputs({}, {"keys": row.flip(2)}), FP32).failures(FP32)


def test_a_trace_whose_steps_do_not_cover_its_tokens_is_refused() -> None:
    with pytest.raises(ModelError, match="steps cover 3 positions, there are 4 tokens"):
        CallTrace("short", torch.zeros(4, dtype=torch.int64), (Step("prefill", 3),))


def test_a_description_without_a_reference_is_refused() -> None:
    with pytest.raises(ModelError, match="no eager reference"):
        reference(replace(tiny.tiny(), eager=None), TRACE)


def test_the_reference_leaves_the_training_flag() -> None:
    model = tiny.tiny()
    model.module.train()
    reference(model, TRACE)
    assert model.module.training


# ------------------------------------------------------------------------------------------------ sensitivity


def test_the_first_token_that_is_text_is_perturbed_and_no_other() -> None:
    trace = replace(TRACE, image_token_id=int(TRACE.tokens[0]))
    (one,) = perturbations(trace, tiny.VOCABULARY)
    (moved,) = (one.tokens != trace.tokens).nonzero().flatten().tolist()
    assert moved == next(i for i, token in enumerate(trace.tokens.tolist()) if token != trace.image_token_id)
    assert int(one.tokens[moved]) != trace.image_token_id


@pytest.mark.parametrize(("moved", "sees"), [(0.0, False), (0.0099, False), (0.0101, True), (float("nan"), False)])
def test_a_perturbation_is_seen_from_100_times_the_tolerance(moved: float, sees: bool) -> None:
    assert Sensitivity("first token", moved).sees(FP32) == sees


def verified(model: Model, folder: Path, passes: str) -> verification.VerifyReport:
    source = Source(model).transform(passes) if passes else Source(model)
    artifact = source.capture().rewrite("last-token-logits").lower("eager").save(folder)
    return verification.verify(artifact.path, model, tokens=4, prompt_lengths=(2, 9))


def test_a_model_that_uses_its_first_token_is_seen(tmp_path: Path) -> None:
    report = verified(tiny.tiny(), tmp_path / "artifact", tiny.DEFAULT_PASSES)
    assert report.passed
    assert len(report.traces) == 3
    assert not [unseen for trace in report.traces for unseen in trace.unseen]


def test_a_model_that_ignores_its_first_token_is_reported_as_unseen(tmp_path: Path) -> None:
    report = verified(tiny.tiny(nn.Identity()), tmp_path / "artifact", "")
    assert not report.passed
    for trace in report.traces:
        assert not trace.failures, "it does agree; the comparison just means nothing"
        assert len(trace.unseen) == 2, "the model's own move and the artifact's"
        assert all("first token changed" in one for one in trace.unseen)


def test_prompts_that_do_not_fit_the_context_are_left_out_and_none_is_an_error(tmp_path: Path) -> None:
    artifact = tiny.captured().rewrite("last-token-logits").lower("eager").save(tmp_path / "artifact")
    report = verification.verify(artifact.path, tiny.tiny(), tokens=4, prompt_lengths=(1, 300))
    assert [trace.trace for trace in report.traces] == ["random ids, prompt of 1", "chunked prefill, second turn"]
    with pytest.raises(UsageError, match="do not fit the context of 24"):
        verification.verify(artifact.path, tiny.tiny(), tokens=4, prompt_lengths=(300,))


@pytest.mark.parametrize("tokens", [0, -1])
def test_fewer_than_one_token_is_an_error(tmp_path: Path, tokens: int) -> None:
    artifact = tiny.captured(tiny.tiny(layers=1)).lower("eager").save(tmp_path / "artifact")
    with pytest.raises(UsageError, match="decode between 1 and the context's length"):
        verification.verify(artifact.path, tiny.tiny(layers=1), tokens=tokens)
