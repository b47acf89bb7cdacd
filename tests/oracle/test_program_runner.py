"""Models and programs that are not lowered yet run by method name, and are afterwards what they were."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler.editing import storage_identity
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ModelRunner, ProgramRunner
from triptych.compiler.stages import Source
from triptych.compiler.trace import reference, replay
from triptych.errors import ModelError, VerificationError

KEYS = "blocks.0.attention.routed_attention.cache.keys"
TRACE = tiny.trace(("prefill", 5), ("decode", 2))


@pytest.fixture(scope="module")
def cached(tiny_model: Model) -> Model:
    return Source(tiny_model).transform("static-kv-cache").model


def counting(model: Model) -> Model:
    """The model with state of its own: how many positions it has seen, counted from 100."""
    module = Source(model).transform("static-kv-cache").model.module
    module.register_buffer("seen", torch.tensor([100]))

    def prefill(inner: nn.Module, embeds: Tensor, start_pos: Tensor) -> Tensor:
        seen = inner.get_buffer("seen").add_(embeds.shape[1])
        return tiny.prefill(inner, embeds, start_pos) + 0.0 * seen

    return tiny.with_entry_point(dataclasses.replace(model, module=module), "prefill", forward=prefill)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------- programs


def test_a_program_runs_methods_by_name(tiny_captured: Program, tiny_model: Model) -> None:
    runner = ProgramRunner(tiny_captured)
    assert runner.methods == {"token_embedding": "token_embedding", "prefill": "prefill", "decode": "decode"}
    embeds = runner.run("token_embedding", tokens=TRACE.tokens.unsqueeze(0))["embeds"]
    logits = runner.run("prefill", start_pos=torch.tensor([0]), embeds=embeds)["logits"]
    with torch.no_grad():
        torch.testing.assert_close(logits, tiny_model.module(TRACE.tokens.unsqueeze(0)))


def test_a_program_is_as_it_was_after_running(tiny_captured: Program) -> None:
    before = {name: row.initial.clone() for name, row in tiny_captured.state.items()}
    weights = {key: weight.uses[0].tensor.clone() for key, weight in tiny_captured.weights.items()}
    runner = ProgramRunner(tiny_captured)
    replay(runner, TRACE, runner.methods)
    assert runner.state[KEYS].abs().sum() > 0
    assert_same(before, {name: row.initial for name, row in tiny_captured.state.items()})
    assert_same(weights, {key: weight.uses[0].tensor for key, weight in tiny_captured.weights.items()})


def test_state_of_a_program_starts_fresh_in_every_runner_and_after_a_reset(tiny_captured: Program) -> None:
    runner = ProgramRunner(tiny_captured)
    first = replay(runner, TRACE, runner.methods)
    assert not ProgramRunner(tiny_captured).state[KEYS].any()
    assert runner.state[KEYS].any()
    runner.reset_state()
    assert not runner.state[KEYS].any()
    again = replay(runner, TRACE, runner.methods)
    assert_same(dict(first.outputs), dict(again.outputs))


def test_state_of_a_program_starts_at_its_initial_values(tiny_model: Model) -> None:
    program = Source(counting(tiny_model)).capture().program
    runner = ProgramRunner(program)
    replay(runner, TRACE, runner.methods)
    assert runner.state["seen"].tolist() == [105]
    runner.reset_state()
    assert runner.state["seen"].tolist() == [100]
    assert program.state["seen"].initial.tolist() == [100]


def test_methods_of_a_program_share_their_live_state(tiny_captured: Program) -> None:
    """What prefill wrote decode reads: without it the second logits are others."""
    runner = ProgramRunner(tiny_captured)
    together = replay(runner, TRACE, runner.methods).last_logits
    runner.reset_state()
    start = torch.tensor([5])
    alone = runner.run("decode", tokens=TRACE.tokens[5].reshape(1, 1), start_pos=start)["logits"]
    assert (alone.flatten() - together).abs().max() > 0.01


def test_a_failing_call_of_a_program_is_one_error_with_method_and_shapes(tiny_captured: Program) -> None:
    runner = ProgramRunner(tiny_captured)
    with pytest.raises(VerificationError) as caught:
        runner.run("decode", tokens=torch.zeros(1, 1, dtype=torch.int64), start_pos=torch.tensor([24]))
    message = str(caught.value)
    assert message.startswith("decode fails on inputs of {'tokens': [1, 1], 'start_pos': [1]}: index")
    assert "\n" not in message
    assert caught.value.method == "decode"


# ---------------------------------------------------------------------------------------------------- models


def test_a_model_runs_entry_points_by_name(tiny_model: Model) -> None:
    runner = ModelRunner(tiny_model)
    assert runner.methods == {"token_embedding": "token_embedding", "prefill": "prefill", "decode": "decode"}
    assert not runner.has_cache
    embeds = runner.run("token_embedding", tokens=TRACE.tokens.unsqueeze(0))["embeds"]
    logits = runner.run("prefill", start_pos=torch.tensor([0]), embeds=embeds)["logits"]
    with torch.no_grad():
        torch.testing.assert_close(logits, tiny_model.module(TRACE.tokens.unsqueeze(0)))


def test_a_cached_model_goes_on_from_its_prefill(cached: Model, tiny_model: Model) -> None:
    runner = ModelRunner(cached)
    assert runner.has_cache
    got = replay(runner, TRACE, runner.methods)
    wanted = reference(tiny_model, TRACE)
    torch.testing.assert_close(got.last_logits, wanted.last_logits)
    torch.testing.assert_close(got.state[KEYS], wanted.state[KEYS])


def test_a_model_is_as_it_was_after_running(tiny_model: Model) -> None:
    model = counting(tiny_model)
    before = snapshot(model.module)
    identities = {name: storage_identity(tensor) for name, tensor in model.module.state_dict().items()}
    model.module.train()
    runner = ModelRunner(model)
    replay(runner, TRACE, runner.methods)
    assert model.module.training
    assert_same(before, snapshot(model.module))
    assert identities == {name: storage_identity(tensor) for name, tensor in model.module.state_dict().items()}


def test_state_of_a_model_is_what_calls_have_changed(tiny_model: Model) -> None:
    runner = ModelRunner(counting(tiny_model))
    assert dict(runner.state) == {}
    replay(runner, TRACE, runner.methods)
    caches = {
        f"blocks.{layer}.attention.routed_attention.cache.{row}" for layer in range(3) for row in ("keys", "values")
    }
    assert set(runner.state) == {"seen", *caches}
    assert runner.state["seen"].tolist() == [105]
    runner.reset_state()
    assert dict(runner.state) == {}


def test_buffers_of_a_model_that_are_one_stay_one(tiny_model: Model) -> None:
    model = counting(tiny_model)
    model.module.get_submodule("norm").register_buffer("seen_too", model.module.get_buffer("seen"))
    seen: list[int] = []

    def decode(module: nn.Module, tokens: Tensor, start_pos: Tensor) -> Tensor:
        seen.append(int(module.get_buffer("norm.seen_too")))
        return tiny.decode(module, tokens, start_pos)

    runner = ModelRunner(tiny.with_entry_point(model, "decode", forward=decode))
    replay(runner, TRACE, runner.methods)
    assert seen == [105, 105]


def test_a_failing_call_of_a_model_is_one_error_with_method_and_shapes(cached: Model) -> None:
    with pytest.raises(VerificationError) as caught:
        ModelRunner(cached).run("prefill", embeds=torch.zeros(1, 25, tiny.WIDTH), start_pos=torch.tensor([0]))
    message = str(caught.value)
    assert message.startswith("prefill fails on inputs of {'embeds': [1, 25, 32], 'start_pos': [1]}: index")
    assert "\n" not in message
    assert caught.value.method == "prefill"


def test_an_error_raised_on_purpose_stays_what_it_is(tiny_model: Model) -> None:
    def decode(*_: object) -> Tensor:
        raise ModelError("the model masks its attention in another way")

    runner = ModelRunner(tiny.with_entry_point(tiny_model, "decode", forward=decode))
    with pytest.raises(ModelError, match=r"^the model masks its attention in another way$"):
        runner.run("decode", tokens=torch.zeros(1, 1, dtype=torch.int64), start_pos=torch.tensor([0]))


# ---------------------------------------------------------------------------------------------------- the oracle's use


def test_an_oracle_judges_both_by_the_same_traces(cached: Model, tiny_captured: Program, tiny_oracle: Oracle) -> None:
    for runner in (ModelRunner(cached), ProgramRunner(tiny_captured)):
        reports = list(tiny_oracle.judge(runner, runner.methods))
        assert [report.trace for report in reports] == [plan.name for plan in tiny_oracle.plans]
        assert all(report.passed for report in reports)
        assert all({one.label for one in report.comparison.state} >= {KEYS} for report in reports)
