"""Instruments see what passes do: texts, differences, counts, coverage, and the numbers."""

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from tests.compiler.test_manager import MatchesNothing, MayMatchNothing, ReplacesNorms
from tests.oracle.right_passes import LinearAsMatmul
from tests.oracle.wrong_passes import CountSlots, RoundTrip
from triptych.compiler import manager
from triptych.compiler.instruments import (
    Diff,
    NumericCheck,
    OperatorChange,
    PrintIR,
    Statistics,
    coverage,
    operator_counts,
    subject_text,
    text_diff,
)
from triptych.compiler.manager import Instrument, PassResult
from triptych.compiler.model import EagerOutputs, Model
from triptych.compiler.oracle import Oracle, rounding_tolerance
from triptych.compiler.pass_kinds import Match, Refusal
from triptych.compiler.pipeline import parse
from triptych.compiler.program import Program
from triptych.compiler.shrinking import plan_of
from triptych.compiler.stages import Source
from triptych.compiler.text import program_text
from triptych.compiler.trace import reference
from triptych.errors import PipelineError, VerificationError

(LAST_TOKEN, TO_ATEN) = parse("capture,last-token-logits,legalize-aten").program


def run(program: Program, *passes: Any, instrument: Instrument) -> Program:
    rewritten, _ = manager.run_program(program, passes, instruments=[instrument])
    return rewritten


# ---------------------------------------------------------------------------------------------------- texts


def test_print_before_and_after_write_each_stage(tiny_captured: Program) -> None:
    before: list[str] = []
    after: list[str] = []
    stages = [tiny_captured, run(tiny_captured, LAST_TOKEN, instrument=Instrument())]
    last = run(tiny_captured, LAST_TOKEN, MayMatchNothing(), instrument=PrintIR("before", before.append))
    run(tiny_captured, LAST_TOKEN, MayMatchNothing(), instrument=PrintIR("after", after.append))
    assert before == [
        f"// before last-token-logits\n{program_text(stages[0])}",
        f"// before wrong-pass\n{program_text(stages[1])}",
    ]
    assert after == [
        f"// after last-token-logits\n{program_text(stages[1])}",
        f"// after wrong-pass\n{program_text(last)}",
    ]


def test_print_changed_leaves_out_passes_that_changed_nothing(tiny_captured: Program) -> None:
    heard: list[str] = []
    run(tiny_captured, MayMatchNothing(), LAST_TOKEN, instrument=PrintIR("changed", heard.append))
    (text,) = heard
    assert text.startswith("// after last-token-logits\nprogram\n")
    assert "aten.select.int" in text


def test_a_model_prints_as_its_module_tree(tiny_model: Model) -> None:
    heard: list[str] = []
    manager.run_source(tiny_model, [ReplacesNorms()], instruments=[PrintIR("changed", heard.append)])
    (text,) = heard
    assert text.startswith("// after wrong-pass\nTinyModel(\n")
    assert "(norm): Identity()" in text


def test_a_diff_shows_the_lines_that_a_pass_changed(tiny_captured: Program) -> None:
    heard: list[str] = []
    run(tiny_captured, MayMatchNothing(), LAST_TOKEN, instrument=Diff(heard.append))
    (text,) = heard
    lines = text.splitlines()
    assert lines[:2] == ["--- before last-token-logits", "+++ after last-token-logits"]
    added = [line for line in lines[2:] if line.startswith("+")]
    removed = [line for line in lines[2:] if line.startswith("-")]
    assert "+    out logits: float32[1, 48] -> sampler" in added
    assert "-    out logits: float32[1, S=1..24, 48] -> sampler" in removed
    assert any("aten.select.int" in line for line in added)
    assert not any("triptych.update_cache" in line for line in (*added, *removed))


def test_a_diff_of_a_model_shows_its_modules(tiny_model: Model) -> None:
    heard: list[str] = []
    manager.run_source(tiny_model, [ReplacesNorms()], instruments=[Diff(heard.append)])
    (text,) = heard
    assert "\n-  (norm): LayerNorm((32,), eps=1e-05, elementwise_affine=True, bias=True)\n" in text
    assert "\n+  (norm): Identity()\n" in text


def test_a_diff_ignores_the_numbers_of_results_and_not_those_of_arguments() -> None:
    before = "    %0 = a($x): f\n    %1 = b(%0): f\n    return [%1]\n"
    renumbered = "    %4 = a($x): f\n    %5 = b(%0): f\n    return [%1]\n"
    rewired = "    %0 = a($x): f\n    %1 = b($x): f\n    return [%1]\n"
    assert text_diff(before, renumbered, "old", "new").strip() == ""
    assert text_diff(before, rewired, "old", "new").splitlines()[3:] == [
        "     a($x): f",
        "-    b(%0): f",
        "+    b($x): f",
        "     return [%1]",
    ]


def test_the_text_of_a_subject(tiny_captured: Program, tiny_model: Model) -> None:
    assert subject_text(tiny_captured) == program_text(tiny_captured)
    assert subject_text(tiny_model) == f"{tiny_model.module}\n"


# ---------------------------------------------------------------------------------------------------- counts


def test_statistics_count_what_came_and_went(tiny_captured: Program) -> None:
    statistics = Statistics()
    run(tiny_captured, LinearAsMatmul(), MayMatchNothing(), instrument=statistics)
    assert {one.pass_name for one in statistics.changes} == {"linear-as-matmul"}
    for method in ("prefill", "decode"):
        counts = {one.operator: one.count for one in statistics.changes if one.method == method}
        # Four linear layers in each of three blocks, and the projection to the vocabulary.
        assert counts == {"aten.linear.default": -13, "aten.matmul.default": 13, "aten.t.default": 13}
    assert OperatorChange("linear-as-matmul", "decode", "aten.t.default", 13) in statistics.changes
    assert not any(one.method == "token_embedding" for one in statistics.changes)


def test_statistics_leave_source_transforms_out(tiny_model: Model) -> None:
    statistics = Statistics()
    manager.run_source(tiny_model, [ReplacesNorms()], instruments=[statistics])
    assert statistics.changes == []


def test_operators_of_a_method_are_counted(tiny_captured: Program) -> None:
    counts = operator_counts(tiny_captured, "decode")
    assert (counts["triptych.update_cache.default"], counts["triptych.cached_sdpa.default"]) == (6, 3)
    assert operator_counts(tiny_captured, "encode") == {}


def test_coverage_is_a_matrix_of_passes_and_methods(tiny_captured: Program) -> None:
    _, results = manager.run_program(tiny_captured, [LAST_TOKEN, MayMatchNothing(), TO_ATEN])
    table = coverage(results, list(tiny_captured.methods))
    assert table == {
        "last-token-logits": {"token_embedding": "no candidate", "prefill": "1 matches", "decode": "1 matches"},
        "wrong-pass": {"all": "no candidate"},
        "legalize-aten": {"token_embedding": "no candidate", "prefill": "9 matches", "decode": "9 matches"},
    }


def test_coverage_gives_the_first_reason_where_nothing_matched() -> None:
    refusals = (Refusal("gelu", "is exact", "decode"), Refusal("gelu_1", "is exact too", "decode"))
    refusals += (Refusal("gelu_2", "is in a loop", "prefill"),)
    result = PassResult("fold-gelu", (Match("gelu", "prefill"),), refusals, changed=True, seconds=0.0)
    assert coverage([result], ["prefill", "decode", "encode"]) == {
        "fold-gelu": {
            "prefill": "1 matches, 1 refused",
            "decode": "refused: gelu: is exact",
            "encode": "no candidate",
        }
    }


def test_coverage_of_passes_that_do_not_work_by_method(tiny_model: Model) -> None:
    _, results = manager.run_source(tiny_model, parse("static-kv-cache,swap-sdpa").source)
    assert coverage(results, ["prefill"]) == {
        "static-kv-cache": {"all": "3 matches"},
        "swap-sdpa": {"all": "3 matches"},
    }


# ---------------------------------------------------------------------------------------------------- numbers


def test_numbers_fail_at_the_pass_that_moves_them(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    check = NumericCheck(tiny_oracle)
    wrong = CountSlots("decode", "blocks.1")
    with pytest.raises(
        VerificationError, match=r"^after pass count-slots the model computes something else: random ids"
    ):
        run(tiny_captured, LAST_TOKEN, wrong, TO_ATEN, instrument=check)
    assert list(check.reports) == ["last-token-logits", "count-slots"]
    assert all(report.passed for report in check.reports["last-token-logits"])
    assert not all(report.passed for report in check.reports["count-slots"])


def test_a_call_that_fails_fails_the_pass_by_name(tiny_captured: Program, tiny_model: Model) -> None:
    """One slot too far is past the last one at the end of the context."""
    full = tiny.trace(("prefill", tiny.CONTEXT_LENGTH - 2), ("decode", 2))
    oracle = Oracle(tiny_model, [plan_of(full)])
    wrong = CountSlots("decode", "blocks.1")
    with pytest.raises(VerificationError, match=r"^after pass count-slots decode fails on inputs of .*index") as caught:
        run(tiny_captured, LAST_TOKEN, wrong, instrument=NumericCheck(oracle))
    assert caught.value.method == "decode"


def test_numbers_of_a_model_are_checked_with_and_without_a_cache(tiny_model: Model, tiny_oracle: Oracle) -> None:
    check = NumericCheck(tiny_oracle)
    Source(tiny_model, instruments=(check,)).transform("static-kv-cache,swap-sdpa")
    assert list(check.reports) == ["static-kv-cache", "swap-sdpa"]
    with pytest.raises(VerificationError, match="after pass wrong-pass the model computes something else"):
        manager.run_source(tiny_model, [ReplacesNorms()], instruments=[NumericCheck(tiny_oracle)])


def test_numbers_are_not_checked_where_nothing_changed(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    check = NumericCheck(tiny_oracle)
    run(tiny_captured, MayMatchNothing(), instrument=check)
    assert check.reports == {}


def test_a_pass_may_declare_a_wider_tolerance_and_all_after_it_have_it(
    tiny_captured: Program, tiny_oracle: Oracle
) -> None:
    class Declared(RoundTrip):
        tolerances: ClassVar[Any] = {
            "float32": dataclasses.replace(RoundTrip.tolerances["float32"], relative=0.5, kl=1)
        }

    place = ("decode", "blocks.1", 0)
    with pytest.raises(VerificationError, match="after pass round-trip"):
        run(tiny_captured, RoundTrip(*place), instrument=NumericCheck(tiny_oracle))
    check = NumericCheck(tiny_oracle)
    run(tiny_captured, Declared(*place), LAST_TOKEN, instrument=check)
    assert {report.tolerance.relative for report in check.reports["last-token-logits"]} == {0.5}
    narrow = NumericCheck(tiny_oracle)
    run(tiny_captured, LAST_TOKEN, instrument=narrow)
    assert {report.tolerance.relative for report in narrow.reports["last-token-logits"]} == {1e-4}


def test_quantizing_moves_the_reference(tiny_model: Model, tiny_oracle: Oracle) -> None:
    check = NumericCheck(tiny_oracle)
    source = Source(tiny_model, instruments=(check,)).quantize("8da4w")
    assert check.reports == {}
    assert check.oracle.model is source.model
    source.transform("static-kv-cache")
    (reports,) = check.reports.values()
    assert all(report.passed and report.against == "quantized" for report in reports)


def test_the_noise_of_rounding_is_looked_for_on_both_sides(tiny_model: Model) -> None:
    """A value exactly on a step falls to another one where it shrinks, and stays where it grows."""
    trace = tiny.trace(("prefill", 3))

    def eager(module: nn.Module, tokens: Tensor, _: tuple[Tensor, ...]) -> EagerOutputs:
        embedding = module.get_submodule("embedding")
        ones = embedding(tokens) / embedding.get_parameter("weight")[tokens]
        return EagerOutputs(torch.floor(ones), (), ones)

    model = dataclasses.replace(tiny_model, eager=eager)
    tolerance = rounding_tolerance(model, trace, reference(model, trace))
    assert tolerance.relative == pytest.approx(4.0)


def test_a_pass_that_matches_nothing_reaches_no_instrument(tiny_captured: Program) -> None:
    heard: list[str] = []
    with pytest.raises(PipelineError, match="wrong-pass matched nothing"):
        run(tiny_captured, MatchesNothing(), instrument=PrintIR("after", heard.append))
    assert heard == []
