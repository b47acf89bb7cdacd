"""An explanation says of every candidate what `run` would do with it, and changes nothing."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler.rules import DropAddZero, GatedSilu, Spelled, of_function, sin_of_cos
from triptych.compiler.explain import Candidate, explain, explanation_text, from_run
from triptych.compiler.fingerprint import fingerprint
from triptych.compiler.manager import run_program
from triptych.compiler.program import Program
from triptych.compiler.rewrite_rule import RewriteRule
from triptych.errors import VerificationError
from triptych.passes.expand_tanh_gelu import ExpandTanhGelu

aten = torch.ops.aten


@dataclass(frozen=True)
class ResidualGelu(RewriteRule):
    """A feed-forward layer with its residual."""

    name: ClassVar[str] = "residual-gelu"
    approximate: str = "none"

    def pattern(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = aten.gelu.default(aten.linear.default(x, up), approximate=self.approximate)
        return aten.add.Tensor(x, aten.linear.default(hidden, down))

    def replacement(self, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up), approximate=self.approximate), down) + x


def test_every_candidate_is_listed_with_its_place_and_how_far_it_came(tiny_program: Program) -> None:
    method = tiny_program.methods["prefill"]
    before = fingerprint(method.exported)
    candidates = explain(ResidualGelu(), "prefill", method)
    assert fingerprint(method.exported) == before
    adds = [node.name for node in method.exported.graph.nodes if node.target is aten.add.Tensor]
    assert [one.where for one in candidates] == adds
    near = candidates[3]
    assert (near.method, near.operator, near.layer, near.matched) == ("prefill", "aten.add.Tensor", "blocks.0", False)
    assert near.line is not None
    assert near.line.startswith("tiny.py:")
    assert near.reason == "operand 1 (approximate) of aten.gelu.default (%gelu) is 'tanh', the pattern has 'none'"
    fitted = [step.split(" (")[0] for step in near.trail]
    assert fitted == ["aten.add.Tensor", "aten.linear.default", "aten.gelu.default", "aten.linear.default"]


def test_an_explanation_agrees_with_the_run(tiny_program: Program) -> None:
    rule = ResidualGelu(approximate="tanh")
    _, (result,) = run_program(tiny_program, [rule])
    for name in ("prefill", "decode"):
        candidates = explain(rule, name, tiny_program.methods[name])
        assert [one.where for one in candidates if one.matched] == [
            match.where for match in result.matches if match.method == name
        ]
        assert [(one.where, one.reason) for one in candidates if not one.matched] == [
            (refusal.where, refusal.reason) for refusal in result.refusals if refusal.method == name
        ]


def test_without_a_candidate_the_missing_operators_and_their_likes_are_named(tiny_program: Program) -> None:
    (only,) = explain(GatedSilu(), "prefill", tiny_program.methods["prefill"])
    assert only == Candidate(
        "prefill",
        None,
        "the graph has no aten.mul.Tensor, in which the pattern ends; the pattern needs aten.silu.default, "
        "aten.mul.Tensor, the graph lacks aten.silu.default, aten.mul.Tensor; nearest by name: aten.gelu.default",
    )
    assert explanation_text("gated-silu", [only]) == f"gated-silu: no candidate\n  prefill: {only.reason}\n"


def test_an_explanation_reads_as_text() -> None:
    method = of_function(lambda module, x, y: F.gelu(x) * y + (F.silu(x) * y), (3,), (3,)).methods["main"]
    lines = explanation_text("gated-silu", explain(GatedSilu(), "main", method)).splitlines()
    assert lines[0] == "gated-silu: 1 of 2 candidates match"
    assert lines[1].startswith("  main: %mul aten.mul.Tensor (rules.py:")
    assert "): aten.silu.default expected as operand 0 (self) of aten.mul.Tensor (%mul), found aten.gelu" in lines[1]
    assert lines[2].startswith("  main: %mul_1 aten.mul.Tensor (")
    assert lines[2].endswith("): matches")


def test_the_text_says_what_fitted_until_then(tiny_program: Program) -> None:
    text = explanation_text("residual-gelu", explain(ResidualGelu(), "decode", tiny_program.methods["decode"]))
    assert text.count("until then fitted aten.add.Tensor (%add_") == 4
    assert "aten.linear.default (%linear_3, tiny.py:" in text


def test_a_replacement_that_fails_is_explained_and_a_wrong_pattern_is_an_error() -> None:
    method = of_function(sin_of_cos, (3,)).methods["main"]
    (only,) = explain(Spelled(how="half"), "main", method)
    assert (only.where, only.operator, only.matched) == ("sin", "aten.sin.default", False)
    assert only.reason is not None
    assert "the replacement gives float16[3] where float32[3] stood" in only.reason

    @dataclass(frozen=True)
    class NoOperator(DropAddZero):
        name: ClassVar[str] = "no-operator"

        def pattern(self, x: Tensor, zero: float) -> Any:
            return x + zero

    with pytest.raises(VerificationError, match="rule no-operator: the pattern calls add"):
        explain(NoOperator(), "main", method)


def test_other_passes_are_explained_by_what_they_announce(tiny_program: Program) -> None:
    candidates = explain(ExpandTanhGelu(), "prefill", tiny_program.methods["prefill"])
    assert [(one.where, one.operator, one.layer, one.matched) for one in candidates] == [
        ("gelu", "aten.gelu.default", "blocks.0", True),
        ("gelu_1", "aten.gelu.default", "blocks.1", True),
    ]


def test_a_run_of_any_pass_gives_candidates() -> None:
    program = of_function(lambda module, x: (x + 0) * (x + 1.5), (3,))
    _, (result,) = run_program(program, [DropAddZero()])
    text = explanation_text("drop-add-zero", from_run(result.matches, result.refusals))
    first, second, third = text.splitlines()
    assert first == "drop-add-zero: 1 of 2 candidates match"
    assert second.startswith("  main: add (rules.py:")
    assert third.endswith("): adds 1.5, not 0")
