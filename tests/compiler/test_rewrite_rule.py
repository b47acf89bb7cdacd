"""A rule rewrites what its pattern means, says why it leaves the rest, and never changes what a method computes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from tests.compiler.rules import (
    DoubleRelu,
    FeedForward,
    FromFunction,
    FuseLinears,
    GatedSilu,
    S,
    SharedDoubleRelu,
    Spelled,
    applied,
    captured,
    of_function,
    reasons,
    sin_of_cos,
    targets,
)
from triptych.compiler.editing import GraphEditor
from triptych.compiler.manager import run_program
from triptych.compiler.pass_kinds import MatchLog
from triptych.compiler.program import Method
from triptych.compiler.provenance import made_by, module_path, source_line
from triptych.compiler.rewrite_rule import RewriteRule
from triptych.errors import VerificationError

aten = torch.ops.aten


def test_matches_back_to_back_are_all_rewritten() -> None:
    program = of_function(lambda module, x: F.silu(F.silu(x) * x) * x, (3,))
    _, result = applied(program, GatedSilu(), torch.randn(3))
    assert [match.where for match in result.matches] == ["mul", "mul_1"]


def test_of_overlapping_matches_the_first_is_rewritten() -> None:
    program = of_function(lambda module, x: torch.relu(torch.relu(torch.relu(x))), (3,))
    rewritten, result = applied(program, DoubleRelu(), torch.randn(3))
    assert targets(rewritten) == ["aten.relu.default"] * 2
    assert [match.where for match in result.matches] == ["relu_1"]
    assert "belongs to the overlapping match at %relu_1" in result.refusals[1].reason


@pytest.mark.parametrize("held_back", [0, 1])
def test_a_match_that_is_held_back_stays_as_it_is_and_the_others_keep_their_numbers(held_back: int) -> None:
    program = of_function(lambda module, x: torch.relu(torch.relu(torch.relu(torch.relu(torch.relu(x))))), (3,))
    rewritten, (result,) = run_program(program, [DoubleRelu()], select=lambda method, number: number != held_back)
    assert [match.where for match in result.matches] == [["relu_3"], ["relu_1"]][held_back]
    assert targets(rewritten) == ["aten.relu.default"] * 4


def test_a_value_within_the_match_that_others_use_is_refused() -> None:
    program = of_function(lambda module, x, y: (gate := F.silu(x)) * y + gate.sum(), (3,), (3,))
    (reason,) = reasons(program, GatedSilu())
    assert reason.startswith("aten.silu.default (%silu, rules.py:")
    assert "within the match, is also used by aten.sum.default (%sum_1, rules.py:" in reason


def test_a_value_within_the_match_that_the_method_returns_is_refused() -> None:
    program = of_function(lambda module, x, y: ((gate := F.silu(x)) * y, gate), (3,), (3,), outputs=2)
    assert "within the match, is also returned by the method" in reasons(program, GatedSilu())[0]


def test_a_rule_may_allow_others_to_use_what_is_within() -> None:
    program = of_function(
        lambda module, x: (torch.relu(inner := torch.relu(x)), torch.relu(inner), inner), (3,), outputs=3
    )
    rewritten, result = applied(program, SharedDoubleRelu(), torch.randn(3))
    assert [match.where for match in result.matches] == ["relu_1", "relu_2"]
    assert targets(rewritten) == ["aten.relu.default"] * 3


# ---------------------------------------------------------------------------------------------------- replacement


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("half", r"the replacement gives float16\[s\d+, 4\] where float32\[s\d+, 4\] stood"),
        ("row", r"the replacement gives float32\[1, 4\] where float32\[s\d+, 4\] stood"),
        ("pair", r"the replacement gives \(float32\[s\d+, 4\], float32\[s\d+, 4\]\) where"),
        ("number", r"the replacement gives 3\.0 where"),
        ("nothing", r"the replacement gives nothing where"),
        ("constant", r"the replacement makes a tensor of Python values; use an operator like torch\.full"),
        ("length", r"the replacement decides by a dynamic size \(s\d+ > 4\)"),
        ("fails", r"the replacement cannot be traced: no luck with rank 2"),
    ],
)
def test_a_wrong_replacement_is_the_rule_authors_error(how: str, message: str) -> None:
    program = of_function(sin_of_cos, (S, 4))
    where = r"rule spelled at aten\.sin\.default \(%sin, rules\.py:\d+\): "
    with pytest.raises(VerificationError, match=f"{where}{message}.*; rule author: mend the replacement"):
        run_program(program, [Spelled(how=how)])
    # Nothing of the failed attempt stays behind in the symbols that all graphs of the program share.
    with pytest.raises(VerificationError, match=message):
        run_program(program, [Spelled(how=how)])


def test_a_replacement_returns_as_many_results_as_the_pattern() -> None:
    @dataclass(frozen=True)
    class OneOfTwo(FuseLinears):
        name: ClassVar[str] = "one-of-two"

        def replacement(self, x: Tensor, first: Tensor, second: Tensor) -> Any:
            return F.linear(x, first)

    with pytest.raises(VerificationError, match=r"the replacement returns 1 results, the pattern 2"):
        run_program(captured(FeedForward().eval(), (2, 4), outputs=2), [OneOfTwo()])


def test_other_strides_are_carried_on_to_what_follows() -> None:
    program = of_function(lambda module, x: torch.sin(torch.cos(x)) * 2, (S, 4))
    rewritten, _ = applied(program, Spelled(how="transposed"), torch.randn(5, 4))
    (mul,) = [node for node in rewritten.methods["main"].exported.graph.nodes if node.name == "mul"]
    assert mul.meta["val"].stride()[0] == 1


def test_a_view_that_other_strides_forbid_becomes_a_reshape() -> None:
    program = of_function(lambda module, x: torch.sin(torch.cos(x)).view(-1), (3, 4))
    rewritten, _ = applied(program, Spelled(how="transposed"), torch.randn(3, 4))
    assert "aten.reshape.default" in targets(rewritten)


def test_other_strides_that_what_follows_cannot_take_are_an_error() -> None:
    program = of_function(lambda module, x: torch.view_as_complex(torch.sin(torch.cos(x))).abs(), (3, 2))
    with pytest.raises(VerificationError, match=r"with the strides of the replacement, what follows fails: .*"):
        run_program(program, [Spelled(how="transposed")])


@pytest.mark.parametrize("length", [2, 9])
def test_a_dynamic_size_stays_dynamic(length: int) -> None:
    @dataclass(frozen=True)
    class FlatSum(RewriteRule):
        name: ClassVar[str] = "view"

        def pattern(self, x: Tensor, length: int) -> Tensor:
            return aten.view.default(x, [length, -1])

        def replacement(self, x: Tensor, length: int) -> Tensor:
            return x.reshape(length, 2, 2).flatten(1)

    module = FromFunction(lambda module, x: (x * 2).view(x.shape[0], -1) + 1)
    program = captured(module.eval(), (S, 2, 2))
    rewritten, _ = run_program(program, [FlatSum()])
    exported = rewritten.methods["main"].exported
    x = torch.randn(length, 2, 2)
    torch.testing.assert_close(exported.module()(x), module(x))
    assert rewritten.methods["main"].outputs[0].shape == (S, 4)
    assert exported.range_constraints == program.methods["main"].exported.range_constraints


class Norms(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(F.silu(F.linear(x, w)), (4,), eps=1e-6)


def test_a_replacement_gives_the_operators_that_capture_gives() -> None:
    @dataclass(frozen=True)
    class Through(RewriteRule):
        name: ClassVar[str] = "through"

        def pattern(self, x: Tensor, w: Tensor) -> Tensor:
            return aten.matmul.default(x, w)

        def replacement(self, x: Tensor, w: Tensor) -> Tensor:
            result: Tensor = Norms()(x, w)
            return result

    rewritten, _ = run_program(of_function(lambda module, x, w: x @ w, (S, 4), (4, 4)), [Through()])
    wanted = captured(Norms(), (S, 4), (4, 4))
    assert (
        targets(rewritten) == targets(wanted) == ["aten.linear.default", "aten.silu.default", "aten.rms_norm.default"]
    )


def test_a_neutral_operator_in_a_replacement_stays_one_call() -> None:
    @dataclass(frozen=True)
    class Attention(RewriteRule):
        name: ClassVar[str] = "attention"

        def pattern(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return aten.scaled_dot_product_attention.default(q, k, v, None, 0.0, True)

        def replacement(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            start = torch.zeros(1, dtype=torch.int64)
            attended: Tensor = torch.ops.triptych.cached_sdpa(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), start
            )
            return attended.transpose(1, 2)

    shape = (1, 2, S, 4)
    program = of_function(lambda module, *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), *[shape] * 3)
    rewritten, _ = applied(program, Attention(), *(torch.randn(1, 2, 6, 4) for _ in range(3)))
    assert targets(rewritten).count("triptych.cached_sdpa.default") == 1


def test_new_nodes_know_where_they_come_from() -> None:
    @dataclass(frozen=True)
    class ExactGelu(RewriteRule):
        name: ClassVar[str] = "spell-gelu"

        def pattern(self, x: Tensor, approximate: str) -> Tensor:
            return aten.gelu.default(x, approximate=approximate)

        def replacement(self, x: Tensor, approximate: str) -> Tensor:
            assert approximate == "tanh"
            return F.sigmoid(1.5957691216 * (x + 0.044715 * x * x * x)) * x

    model = tiny.tiny()
    program = tiny.captured(model).program
    rewritten, result = applied(
        program, ExactGelu(), torch.randn(1, 3, tiny.WIDTH), torch.tensor([0]), method="prefill"
    )
    gelu = next(node for node in program.methods["prefill"].exported.graph.nodes if node.name == "gelu")
    new = [node for node in rewritten.methods["prefill"].exported.graph.nodes if made_by(node) == "spell-gelu"]
    assert len(new) == 2 * 7
    assert {module_path(node) for node in new} == {"blocks.0", "blocks.1"}
    assert {source_line(node) for node in new} == {source_line(gelu)}
    assert all(isinstance(node.meta["val"], Tensor) for node in new)
    assert {match.layer for match in result.matches} == {"blocks.0", "blocks.1"}
    tokens = torch.randint(0, tiny.VOCABULARY, (1, 6))
    embeds = rewritten.methods["token_embedding"].exported.module()(tokens)
    torch.testing.assert_close(
        rewritten.methods["prefill"].exported.module()(embeds, torch.tensor([0])),
        model.module(tokens),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_rule_that_finds_no_candidate_leaves_the_graph_alone() -> None:
    method: Method = of_function(sin_of_cos, (3,)).methods["main"]
    editor, log = GraphEditor(method.exported), MatchLog("main")
    values = {node: node.meta.get("val") for node in editor.graph.nodes}
    GatedSilu().rewrite(editor, method, log)
    assert not editor.changed
    assert (log.matches, log.refusals, log.asked) == ([], [], 0)
    assert all(node.meta.get("val") is values[node] for node in editor.graph.nodes)
