"""`cond-attention` keeps the keys and values of encoder inputs, and refuses what it could not keep."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from tests.passes import cross_attentions
from tests.passes.cross_attentions import PATCHES, PLACEHOLDER, Cross, seeing
from triptych.compiler.model import EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.oracle import Oracle
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.roles import OTHER
from triptych.compiler.stages import Captured, Source
from triptych.compiler.targets.pte import read_pte
from triptych.compiler.trace import Step
from triptych.compiler.trace_plans import TracePlan
from triptych.errors import LoweringError, PipelineError
from triptych.manifest import DynamicDim, TensorSignature
from triptych.modules.cross_attention import CrossAttentionCache
from triptych.passes.cond_attention import CondAttention
from triptych.runtime.loaders import load_runner
from triptych.testing import check_pass

PASSES = "cond-attention,static-kv-cache,swap-sdpa"
CACHES = tuple(f"cross.{layer}.cross_attention.cache.{part}" for layer in range(2) for part in ("keys", "values"))
SEEN = "encoder_input_state.seen"
NAN = torch.full((1, PATCHES, tiny.WIDTH), torch.nan)
YES, NO = torch.tensor([True]), torch.tensor([False])


def conversation(*steps: tuple[str, int], image_at: int | None = 0) -> TracePlan:
    def tokens(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, PLACEHOLDER, (sum(count for _, count in steps),), generator=generator)
        if image_at is not None:
            drawn[image_at] = PLACEHOLDER
        return drawn

    pictures = () if image_at is None else (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
    name = f"image at {image_at}"
    return TracePlan(name, tuple(Step(kind, count) for kind, count in steps), tokens, pictures, PLACEHOLDER)


SECOND_TURN = conversation(("prefill", 5), ("decode", 2), ("prefill", 4), ("decode", 2))
LATER = conversation(("prefill", 3), ("decode", 1), ("prefill", 4), ("decode", 2), image_at=4)
TEXT = conversation(("prefill", 5), ("decode", 2), image_at=None)


@pytest.fixture(scope="module")
def model() -> Model:
    return seeing()


@pytest.fixture(scope="module")
def oracle(model: Model) -> Oracle:
    return Oracle(model, (SECOND_TURN, LATER, TEXT))


@pytest.fixture(scope="module")
def captured(model: Model) -> Captured:
    return Source(model).transform(PASSES).capture().rewrite("last-token-logits")


# ---------------------------------------------------------------------------------------------------- an encoder writes


def test_it_matches_each_cross_attention_and_nothing_else(model: Model, oracle: Oracle) -> None:
    checked = check_pass(CondAttention(), model, matches=2, oracle=oracle)
    assert [match.where for match in checked.result.matches] == ["cross.0", "cross.1"]


def test_the_encoder_writes_what_the_others_read(captured: Captured) -> None:
    state = captured.program.state
    assert set(CACHES) | {SEEN} <= set(state)
    for name in (*CACHES, SEEN):
        assert state[name].writers == ("vision_encoder",)
        assert state[name].readers == ("prefill", "decode")
    assert [port.name for port in captured.program.methods["prefill"].inputs] == ["tokens", "start_pos"]
    assert [port.name for port in captured.program.methods["decode"].inputs] == ["tokens", "start_pos"]


def test_work_on_the_encoder_output_moves_into_the_encoder(model: Model) -> None:
    """Keys and values come of the fused projection of both; only the output projection stays in prefill alone."""
    program = Source(model).transform(PASSES).capture().program
    for layer in range(2):
        assert program.weights[f"cross.{layer}.out.weight"].users == ("decode", "prefill")
    assert linears(program, "vision_encoder") == 1 + 2
    assert linears(program, "prefill") == linears(program, "decode") == 2 * (4 + 2) + 1


def linears(program: Program, method: str) -> int:
    nodes = program.methods[method].exported.graph.nodes
    return sum(node.target is torch.ops.aten.linear.default for node in nodes)


def test_the_program_holds_parity(captured: Captured, oracle: Oracle) -> None:
    runner = ProgramRunner(captured.program)
    for report in oracle.judge(runner, runner.methods, perturbed=True):
        assert report.passed, (report.trace, report.failures, report.unseen)
        compared = {one.label for one in report.comparison.state}
        assert ({*CACHES, SEEN} <= compared) is (report.trace != "image at None")


@pytest.mark.slow
def test_the_pte_holds_parity_and_reading_costs_no_copy(captured: Captured, oracle: Oracle, tmp_path: Path) -> None:
    artifact = captured.lower("xnnpack").save(tmp_path / "artifact")
    methods = {role: name for name, method in artifact.manifest.methods.items() for role in method.roles}
    with load_runner(artifact.path, artifact.manifest) as runner:
        for report in oracle.judge(runner, methods, perturbed=True):
            assert report.passed, (report.trace, report.failures, report.unseen)
        trace = oracle.references[0].trace
        content = {"tokens": torch.tensor([[3]]), "start_pos": torch.tensor([len(trace.tokens)])}
        runner.run("vision_encoder", pixel_values=trace.pixel_values[0])
        sees = runner.run("decode", **content)["logits"]
        runner.state[CACHES[1]].zero_()
        assert float((runner.run("decode", **content)["logits"] - sees).abs().max()) > 1e-2 * float(sees.abs().max())
    found = read_pte(artifact.path / "model.pte").methods
    for name in (*CACHES, SEEN):
        assert len({found[method].state[name] for method in ("vision_encoder", "prefill", "decode")}) == 1
    assert found["vision_encoder"].operators["aten::copy_"] == len(CACHES) + 1
    assert not {"aten::copy_"} & {*found["prefill"].operators, *found["decode"].operators}


@pytest.mark.slow
def test_a_row_that_a_delegate_would_freeze_is_no_silent_constant() -> None:
    """As the weight of a linear layer a row that is only read would be packed at export, with its value of then."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(8, 8))

    def write(module: nn.Module, x: Tensor) -> Tensor:
        rows: Tensor = module.rows  # type: ignore[assignment]
        rows.copy_(x)
        return x.sum(0, keepdim=True)

    port = TensorSignature("x", "float32", (8, 8))
    entries = (
        EntryPoint("write", frozenset({OTHER}), write, (port,), (OutputPort("sum"),)),
        EntryPoint("read", frozenset({OTHER}), lambda module, x: F.linear(x, module.rows), (port,), (OutputPort("y"),)),
    )
    captured = Source(Model(Rows(), entries, Metadata(8, 8, 8))).capture()
    assert captured.program.state["rows"].readers == ("read",)
    with pytest.raises(LoweringError, match="constant data node"):
        captured.lower("xnnpack")


# ---------------------------------------------------------------------------------------------------- the caller gives


def test_without_a_new_encoder_input_the_kept_one_is_attended_to() -> None:
    model = seeing(from_encoder=False)
    program = Source(model).transform("cond-attention").capture().program
    assert program.state[SEEN].writers == ("prefill", "decode")
    runner = ProgramRunner(program)
    first, start = torch.randn(1, PATCHES, tiny.WIDTH), torch.zeros(1, dtype=torch.int64)
    calls = ((NAN, NO, None), (first, YES, first), (NAN, NO, first), (-first, YES, -first), (NAN, NO, -first))
    for given, present, attended in calls:
        tokens = torch.randint(0, PLACEHOLDER, (1, 5))
        with torch.no_grad():
            without = attended is None
            states = torch.zeros_like(NAN) if attended is None else attended
            expected = model.module.logits(tokens, start, states, NO if without else YES)  # type: ignore[operator]
        inputs = {"tokens": tokens, "start_pos": start, "encoder_states": given, "encoder_present": present}
        torch.testing.assert_close(runner.run("prefill", **inputs)["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_forward_that_does_not_ask_for_presence_needs_no_row_for_it() -> None:
    model = seeing(from_encoder=False)
    always = torch.ones(1, dtype=torch.bool)
    entries = tuple(
        dataclasses.replace(entry, forward=lambda module, *inputs: module.logits(*inputs[:3], always))
        for entry in model.entry_points
    )
    program = Source(dataclasses.replace(model, entry_points=entries)).transform("cond-attention").capture().program
    assert set(program.state) == set(CACHES)


def test_whispers_own_attention_is_matched() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.whisper.modeling_whisper import WhisperAttention

    config = transformers.WhisperConfig(d_model=tiny.WIDTH, attn_implementation="sdpa")

    class Whisper(Cross):
        def __init__(self) -> None:
            super().__init__()
            self.whisper = WhisperAttention(tiny.WIDTH, 4, is_decoder=True, layer_idx=0, config=config)

        def forward(self, x: Tensor, states: Tensor) -> Tensor:
            return self.whisper(x, key_value_states=states)[0]  # type: ignore[no-any-return]

    source = Source(seeing(Whisper())).transform("cond-attention")
    assert [match.where for match in source.results[0].matches] == ["cross.0.whisper"]


# ---------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "causal": (cross_attentions.Causal, r"is causal \(is_causal=True\)"),
    "dropout": (cross_attentions.Dropping, "uses dropout"),
    "two calls": (cross_attentions.Twice, "makes 2 attention calls in one prefill"),
    "a batch": (cross_attentions.Batched, "runs on batch size 2"),
    "a changed encoder output": (cross_attentions.Renormalized, "is not called with encoder_states itself"),
}


@pytest.mark.parametrize(("attention", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_it_refuses(attention: type[nn.Module], reason: str) -> None:
    with pytest.raises(PipelineError, match=rf"cond-attention matched nothing: cross\.0: .*{reason}"):
        Source(seeing(attention())).transform("cond-attention")


def test_keys_of_both_sequences_are_no_candidate() -> None:
    with pytest.raises(PipelineError, match="no attention has keys and values that follow encoder_states alone"):
        Source(seeing(cross_attentions.Joint())).transform("cond-attention")


def test_a_model_without_the_two_inputs_has_no_candidate() -> None:
    with pytest.raises(PipelineError, match="no entry point takes encoder_states and encoder_present"):
        Source(tiny.tiny()).transform("cond-attention")


def test_a_second_run_has_nothing_left_to_do() -> None:
    with pytest.raises(PipelineError, match="no entry point takes encoder_states"):
        Source(seeing(Cross())).transform("cond-attention,cond-attention")
    with pytest.raises(PipelineError, match="keeps its encoder input already"):
        Source(seeing(Cross(), from_encoder=False)).transform("cond-attention,cond-attention")


def test_a_part_is_not_kept() -> None:
    with pytest.raises(PipelineError, match=r"kept whole or not at all, and cross\.1 uses dropout"):
        Source(seeing(Cross(), cross_attentions.Dropping())).transform("cond-attention")


@pytest.mark.parametrize("from_encoder", [True, False])
def test_a_model_that_uses_the_encoder_output_elsewhere_too_is_refused(from_encoder: bool) -> None:
    with pytest.raises(PipelineError, match=r"prefill computes something else .*; it uses encoder_states elsewhere"):
        Source(seeing(leaks=True, from_encoder=from_encoder)).transform("cond-attention")


def test_an_encoder_output_of_any_length_is_refused() -> None:
    states = TensorSignature("encoder_states", "float32", (1, DynamicDim("T", 1, PATCHES), tiny.WIDTH), ("image",))
    with pytest.raises(PipelineError, match=r"encoder_states of prefill has shape .*a fixed number of positions"):
        Source(seeing(from_encoder=False, states=states)).transform("cond-attention")


def test_it_comes_before_the_caches_of_self_attention() -> None:
    with pytest.raises(PipelineError, match="cond-attention"):
        Source(seeing()).transform("static-kv-cache,cond-attention")


# ---------------------------------------------------------------------------------------------------- wrong variants


def test_a_cache_that_keeps_no_values_is_found_by_the_pass_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(cache: CrossAttentionCache, keys: Tensor, values: Tensor, present: object) -> tuple[Tensor, Tensor]:
        if present is True:
            cache.keys.copy_(keys)
        return (keys, values) if present is True else (cache.keys, cache.values)

    monkeypatch.setattr(CrossAttentionCache, "forward", forgets)
    with pytest.raises(PipelineError, match="computes something else with an encoder input"):
        Source(seeing()).transform("cond-attention")


class Forgetful(ProgramRunner):
    """Its decode starts from the initial values of some rows, as where a method has state of its own."""

    rows: tuple[str, ...] = ()

    def run(self, method: str, **tensors: Tensor) -> Mapping[str, Tensor]:  # type: ignore[override]
        kept = {name: self.state[name].clone() for name in self.rows}
        if method == "decode":
            for name in self.rows:
                self.state[name].zero_()
        result = super().run(method, **tensors)
        for name, row in kept.items():
            if method == "decode":
                self.state[name].copy_(row)
        return result


@pytest.mark.parametrize("rows", [CACHES[:2], (SEEN,)], ids=["keys and values", "seen"])
def test_state_that_is_not_shared_goes_red(captured: Captured, oracle: Oracle, rows: tuple[str, ...]) -> None:
    runner = Forgetful(captured.program)
    runner.rows = rows
    reports = {one.trace: one for one in oracle.judge(runner, runner.methods)}
    assert not reports["image at 0"].passed
    assert any(failure.startswith("decode@") for failure in reports["image at 0"].failures)
