"""The graph editor derives weights once for all methods, and never from state."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from tests.compiler import tiny
from triptych.compiler.derived_weights import DerivedWeights
from triptych.compiler.editing import GraphEditor, storage_identity
from triptych.compiler.manager import run_program
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method, Program
from triptych.errors import VerificationError


@dataclass(frozen=True)
class TransposeUp(GraphPass):
    """Multiply by the transposed weight of each layer's first wide linear."""

    name: ClassVar[str] = "transpose-up"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        for node in wide(editor):
            if log.match(node):
                weight = editor.derive_weight("transposed", [weight_of(node)], lambda weight: weight.t())
                with editor.graph.inserting_before(node):
                    product = editor.call(torch.ops.aten.matmul.default, node.args[0], weight, like=node)
                node.replace_all_uses_with(product)


def wide(editor: GraphEditor) -> list[Node]:
    """The linears from width to twice the width."""
    shape = (2 * tiny.WIDTH, tiny.WIDTH)
    calls = editor.calls(torch.ops.aten.linear.default)
    return [node for node in calls if weight_of(node).meta["val"].shape == shape]


def weight_of(linear: Node) -> Node:
    weight = linear.args[1]
    assert isinstance(weight, Node)
    return weight


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny.captured().program


def editor_of(program: Program, method: str = "prefill", derived: DerivedWeights | None = None) -> GraphEditor:
    return GraphEditor(program.methods[method].exported, "test", derived)


def test_methods_share_what_a_pass_derives(program: Program) -> None:
    rewritten, _ = run_program(program, [TransposeUp()])
    made = [row for row in rewritten.weights.values() if row.key.startswith("transposed")]
    assert [row.users for row in made] == [("decode", "prefill")] * 2
    assert sum(row.nbytes for row in rewritten.weights.values()) == sum(row.nbytes for row in program.weights.values())
    embeds, start = torch.randn(1, 5, tiny.WIDTH), torch.tensor([0])
    with torch.no_grad():
        wanted = program.methods["prefill"].exported.module()(embeds, start)
        got = rewritten.methods["prefill"].exported.module()(embeds, start)
    torch.testing.assert_close(got, wanted)


def test_a_view_is_stored_by_itself(program: Program) -> None:
    editor = editor_of(program)
    source = weight_of(wide(editor)[0])
    for part in (lambda weight: weight[:1], lambda weight: weight.clone()[:, :1]):
        value = editor.tensor(editor.derive_weight("part", [source], part))
        assert value.is_contiguous()
        assert value.untyped_storage().nbytes() == value.nbytes
        assert storage_identity(value) != storage_identity(editor.tensor(source))


def test_what_differs_is_derived_apart(program: Program) -> None:
    editor = editor_of(program)
    one, other = (weight_of(node) for node in wide(editor))

    def scaled(factor: float) -> Node:
        return editor.derive_weight("scaled", [one], lambda weight: weight * factor, key=factor)

    assert scaled(2.0) is scaled(2.0)
    nodes = [
        scaled(2.0),
        scaled(3.0),
        editor.derive_weight("scaled", [one], torch.neg),
        editor.derive_weight("scaled", [one], torch.abs),
        editor.derive_weight("scaled", [other], torch.neg),
    ]
    assert len(set(nodes)) == 5
    assert [editor.tensor_name(node) for node in nodes] == ["scaled", *(f"scaled_{number}" for number in range(1, 5))]
    for node, factor in zip(nodes[:2], (2, 3), strict=True):
        torch.testing.assert_close(editor.tensor(node), editor.tensor(one) * factor)


def test_editors_share_only_through_what_they_are_both_given(program: Program) -> None:
    derived = DerivedWeights(program.state)
    methods = ("prefill", "decode")

    def negated(one: DerivedWeights | None) -> list[Tensor]:
        editors = [editor_of(program, name, one) for name in methods]
        nodes = [editor.derive_weight("n", [weight_of(wide(editor)[0])], torch.neg) for editor in editors]
        return [editor.tensor(node) for editor, node in zip(editors, nodes, strict=True)]

    shared, alone = negated(derived), negated(None)
    assert storage_identity(shared[0]) == storage_identity(shared[1])
    assert storage_identity(alone[0]) != storage_identity(alone[1])


def test_state_is_no_source(program: Program) -> None:
    editor = editor_of(program)
    cache = next(node for node in editor.graph.nodes if (editor.tensor_name(node) or "").endswith("cache.keys"))
    with pytest.raises(VerificationError, match=r"stands for the state .*cache\.keys, which calls change"):
        editor.derive_weight("frozen", [cache], torch.neg)


def test_state_that_another_method_changes_is_no_source(program: Program) -> None:
    editor = editor_of(program, derived=DerivedWeights({"blocks.0.up.weight"}))
    with pytest.raises(VerificationError, match=r"blocks\.0\.up\.weight, which calls change"):
        editor.derive_weight("frozen", [weight_of(wide(editor)[0])], torch.neg)


def test_a_computed_value_is_no_source(program: Program) -> None:
    editor = editor_of(program)
    with pytest.raises(VerificationError, match="stands for no parameter, buffer or constant"):
        editor.derive_weight("late", [wide(editor)[0]], torch.neg)
