"""The oracle and the verifier see: of hundreds of wrong variants of the default model nearly all are caught.

What survives is in survivors.json with the reason why it is harmless, and that reason is checked:

- "equal": every output and every state row has the same bits as without the edit;
- "rounding": nothing changes in exact arithmetic, and outputs move no further than the right program's own rounding;
- "small": outputs move by what the entry says, which is less than what float32 is allowed.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES
from triptych.compiler.program import Program
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.stages import Source
from triptych.compiler.trace import replay
from triptych.compiler.trace_plans import TracePlan, make_plans, subject_of
from triptych.testing.mutation import KINDS, Mutation, Verdict, apply, judge, mutations, sample, survivors

pytestmark = pytest.mark.slow

SOURCE_PASSES: Final = "static-kv-cache,swap-sdpa"
PASSES: Final = {
    "neutral": "last-token-logits",
    "aten": "last-token-logits,legalize-aten",
    "folded": "last-token-logits,remove-no-op-casts,fold-rms-norm",
}
COUNTS: Final = {"neutral": 200, "aten": 140, "folded": 60}
CHANGED: Final = ("prefill", "decode")
"""The methods that the further passes change; the other two are the same in every program."""
LEAST_OF_A_KIND: Final = 15
LEAST_OF_A_METHOD: Final = {"vision_encoder": 45, "token_embedding": 5, "prefill": 110, "decode": 110}
SEED: Final = 20_240
SHARES: Final = 4

STRONGEST_FIRST: Final = ("image in a later turn", "chunked prefill, second turn", "whole context")
WHOLE_CONTEXT: Final = "whole context"


@dataclass(frozen=True)
class Survivor:
    """An entry of survivors.json."""

    program: str
    mutation: Mutation
    harmless: str
    moved: float
    why: str


def read_survivors() -> tuple[Survivor, ...]:
    entries = json.loads((Path(__file__).parent / "survivors.json").read_text(encoding="utf-8"))
    return tuple(Survivor(**{**entry, "mutation": Mutation(**entry["mutation"])}) for entry in entries)


SURVIVORS: Final = read_survivors()


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The calls are small: a second thread costs more than it gives, most of all where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def programs(demo_model: Model) -> Mapping[str, Program]:
    captured = Source(demo_model).transform(SOURCE_PASSES).capture()
    return {name: captured.rewrite(passes).program for name, passes in PASSES.items()}


@pytest.fixture(scope="module")
def plans(demo_model: Model) -> list[TracePlan]:
    """Short conversations, those first in which the most goes on: a wrong variant is judged until one fails."""
    found = {plan.name: plan for plan in make_plans(subject_of(demo_model), tokens=4, prompt_lengths=(1, 17))}
    return [*(found.pop(name) for name in STRONGEST_FIRST), *found.values()]


@pytest.fixture(scope="module")
def oracle(demo_model: Model, plans: list[TracePlan]) -> Oracle:
    return Oracle(demo_model, plans)


@pytest.fixture(scope="module")
def variants(programs: Mapping[str, Program]) -> Mapping[str, list[Mutation]]:
    chosen = {}
    for name, program in programs.items():
        methods = program.methods if name == "neutral" else CHANGED
        found = (one for one in mutations(program) if one.method in methods)
        chosen[name] = sample(found, COUNTS[name], seed=SEED)
    return chosen


@pytest.fixture(scope="module")
def rounding(programs: Mapping[str, Program], oracle: Oracle) -> float:
    """How far the right programs are from the eager model: rounding alone."""
    reports = [
        report
        for program in programs.values()
        for runner in [ProgramRunner(program)]
        for report in oracle.judge(runner, runner.methods)
    ]
    assert all(report.passed for report in reports), "a right program fails, so failures of wrong ones mean nothing"
    return max(report.comparison.worst_relative for report in reports)


def test_the_right_programs_are_far_inside_the_tolerance(rounding: float) -> None:
    assert rounding < 0.1 * DEFAULT_TOLERANCES["float32"].relative


def test_there_are_hundreds_of_variants_of_every_kind_in_every_method_and_layer(
    variants: Mapping[str, list[Mutation]],
) -> None:
    chosen = [one for some in variants.values() for one in some]
    assert len(chosen) >= 300
    assert all(len(set(some)) == len(some) == COUNTS[name] for name, some in variants.items())
    kinds, methods = Counter(one.kind for one in chosen), Counter(one.method for one in chosen)
    assert set(kinds) == set(KINDS)
    assert min(kinds.values()) >= LEAST_OF_A_KIND, kinds
    assert all(methods[name] >= least for name, least in LEAST_OF_A_METHOD.items()), methods
    layers = Counter((one.method, one.layer) for one in chosen if one.layer is not None)
    wanted = {("vision_encoder", f"model.vision_tower.encoder.layers.{index}") for index in range(3)}
    wanted |= {(method, f"model.language_model.layers.{index}") for method in CHANGED for index in range(4)}
    assert set(layers) == wanted
    assert min(layers.values()) >= 10, layers


def test_what_no_output_depends_on_cannot_be_wrong(programs: Mapping[str, Program]) -> None:
    """The vision tower's last norm runs after the layer whose output is taken."""
    places = {one.place for one in mutations(programs["neutral"]) if one.method == "vision_encoder"}
    assert any("layers.2.layer_norm2" in place for place in places)
    assert not any("post_layernorm" in place for place in places)


def test_at_least_99_percent_are_caught_and_no_entry_is_stale(variants: Mapping[str, list[Mutation]]) -> None:
    assert len(SURVIVORS) <= 0.01 * sum(map(len, variants.values()))
    assert len({(one.program, one.mutation) for one in SURVIVORS}) == len(SURVIVORS)
    stale = [str(one.mutation) for one in SURVIVORS if one.mutation not in variants[one.program]]
    assert not stale, "take these out of survivors.json: they are not among the variants"
    assert all(one.why and one.harmless in ("equal", "rounding", "small") for one in SURVIVORS)


@pytest.mark.parametrize("share", range(SHARES))
def test_what_survives_is_listed_and_harmless(
    share: int,
    programs: Mapping[str, Program],
    oracle: Oracle,
    variants: Mapping[str, list[Mutation]],
    rounding: float,
) -> None:
    for name, program in programs.items():
        judged = variants[name][share::SHARES]
        listed = {one.mutation: one for one in SURVIVORS if one.program == name and one.mutation in judged}
        verdicts: list[Verdict] = []
        found = {verdict.mutation: verdict for verdict in survivors(program, oracle, judged, verdicts.append)}
        refused = [verdict.reason for verdict in verdicts if verdict.caught_by == "verifier"]
        assert all("broke the program" in reason for reason in refused), "an edit that fails is no wrong variant"
        unlisted = [f"{name}: {verdict}" for mutation, verdict in found.items() if mutation not in listed]
        assert not unlisted, "nothing catches these; find out why before listing them"
        assert set(found) == set(listed), "these are caught now; take them out of survivors.json"
        for mutation, entry in listed.items():
            check_harmless(entry, found[mutation], program, oracle, rounding)


def check_harmless(entry: Survivor, verdict: Verdict, program: Program, oracle: Oracle, rounding: float) -> None:
    if entry.harmless == "equal":
        assert differences(program, apply(program, entry.mutation), oracle) == []
    elif entry.harmless == "rounding":
        assert verdict.moved <= 2 * rounding, str(verdict)
    else:
        assert verdict.moved > 2 * rounding, f"{verdict}; it is no more than rounding, so say that"
        assert verdict.moved == pytest.approx(entry.moved, rel=0.2)


def differences(program: Program, other: Program, oracle: Oracle) -> list[str]:
    """Name the outputs and state rows whose bits differ in any trace."""
    first, second = ProgramRunner(program), ProgramRunner(other)
    different = []
    for one in oracle.references:
        wanted, got = (replay(runner, one.trace, runner.methods) for runner in (first, second))
        tables: tuple[Mapping[str, Any], ...] = (wanted.outputs, wanted.state), (got.outputs, got.state)
        for left, right in zip(*tables, strict=True):
            assert left.keys() == right.keys()
            different += [f"{one.trace.name}: {key}" for key in left if not torch.equal(left[key], right[key])]
    return different


@pytest.mark.parametrize(
    "known",
    [
        Survivor(
            "neutral",
            Mutation("dropped", "vision_encoder", "linear_1", "bias left out", "model.vision_tower.encoder.layers.0"),
            "rounding",
            0.0,
            "a bias of keys adds the same to every score of a query, and the softmax takes it out again",
        ),
        Survivor(
            "neutral",
            Mutation(
                "weight",
                "vision_encoder",
                "model.vision_tower.encoder.layers.1.self_attn.out_proj.bias",
                "scaled by 1.01",
                "model.vision_tower.encoder.layers.1",
            ),
            "small",
            5.7e-5,
            "the bias is a small part of what it is added to",
        ),
    ],
    ids=lambda known: known.harmless,
)
def test_an_edit_known_to_be_harmless_survives_for_the_reason_given(
    known: Survivor, programs: Mapping[str, Program], oracle: Oracle, rounding: float
) -> None:
    program = programs[known.program]
    assert known.mutation in set(mutations(program, kinds=[known.mutation.kind]))
    (verdict,) = survivors(program, oracle, [known.mutation])
    check_harmless(known, verdict, program, oracle, rounding)


def test_positions_that_wrap_at_128_are_seen_only_where_the_context_is_filled(
    programs: Mapping[str, Program], oracle: Oracle, plans: list[TracePlan], demo_model: Model
) -> None:
    """Rotary positions as int8 are right up to 127; no other conversation goes that far."""
    program = programs["neutral"]
    narrow = next(
        one
        for one in mutations(program, kinds=["dtype"])
        if (one.method, one.place, one.detail) == ("decode", "add", "through int8")
    )
    short = Oracle(demo_model, [plan for plan in plans if plan.name != WHOLE_CONTEXT])
    assert judge(program, short, narrow).caught_by is None
    verdict = judge(program, oracle, narrow)
    assert verdict.caught_by == "oracle"
    assert verdict.reason.startswith(WHOLE_CONTEXT)
