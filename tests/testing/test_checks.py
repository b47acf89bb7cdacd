"""`check_pass` accepts what keeps its promises, and says which promise a pass broke."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.fx import Node

from tests.compiler import tiny
from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method, Program
from triptych.compiler.registry import find_pass
from triptych.errors import VerificationError
from triptych.testing import check_pass, default_model, default_oracle

aten = torch.ops.aten


@dataclass(frozen=True)
class SpellOut(GraphPass):
    """Replace linear(x, w) by matmul(x, wᵀ), but for the projection to the vocabulary."""

    name: ClassVar[str] = "spell-out"
    uniform: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        for node in editor.calls(aten.linear.default):
            if node.meta["val"].shape[-1] == tiny.VOCABULARY:
                log.refused(node, "it is the projection to the vocabulary")
            elif log.match(node):
                self.replace(editor, node)

    def replace(self, editor: GraphEditor, node: Node) -> None:
        value, weight = node.args
        with editor.graph.inserting_before(node):
            turned = editor.call(aten.t.default, weight, like=node)
            product = editor.call(aten.matmul.default, value, turned, like=node)
        node.replace_all_uses_with(product)
        editor.graph.erase_node(node)


class Scales(SpellOut):
    """Wrong by one percent."""

    def replace(self, editor: GraphEditor, node: Node) -> None:
        with editor.graph.inserting_after(node):
            scaled = editor.call(aten.mul.Tensor, node, 1.01, like=node)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


class Repeats(SpellOut):
    """Right, and matches itself again."""

    def replace(self, editor: GraphEditor, node: Node) -> None:
        with editor.graph.inserting_after(node):
            same = editor.call(aten.mul.Tensor, node, 1.0, like=node)
        node.replace_all_uses_with(same, delete_user_cb=lambda user: user is not same)


class LosesLines(SpellOut):
    """Right, and forgets where its nodes come from."""

    def replace(self, editor: GraphEditor, node: Node) -> None:
        value, weight = node.args
        with editor.graph.inserting_before(node):
            product = editor.call(aten.matmul.default, value, editor.call(aten.t.default, weight))
        node.replace_all_uses_with(product)
        editor.graph.erase_node(node)


MATCHES = {"prefill": 8, "decode": 8}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.tiny(layers=2)


def calls(count: int) -> Callable[[object, object], bool]:
    def effect(_: object, after: object) -> bool:
        assert isinstance(after, Program)
        return sum(node.target is aten.matmul.default for node in after.methods["decode"].exported.graph.nodes) == count

    return effect


def test_a_right_pass_passes(model: Model) -> None:
    checked = check_pass(
        SpellOut(), model, matches=MATCHES, refuses={"linear_8": "projection to the vocabulary"}, effect=calls(8)
    )
    assert len(checked.traces) == 3
    assert all(trace.passed for trace in checked.traces)
    assert checked.again is None, "a second run matches nothing"


def test_a_source_pass_is_checked_too(model: Model) -> None:
    checked = check_pass(find_pass("static-kv-cache")(), model, matches=2, idempotent=False)
    assert checked.traces


@pytest.mark.parametrize(
    ("matches", "message"),
    [
        ({"prefill": 8}, r"spell-out matched \{'prefill': 8, 'decode': 8\}, expected \{'prefill': 8\}"),
        (9, "spell-out matched 16, expected 9 .*projection to the vocabulary"),
    ],
)
def test_another_number_of_matches_fails(model: Model, matches: int | dict[str, int], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_pass(SpellOut(), model, matches=matches)


def test_a_refusal_that_was_not_given_fails(model: Model) -> None:
    with pytest.raises(AssertionError, match=r"refuse 'linear_8' because 'is too small'; it refused \['linear_8"):
        check_pass(SpellOut(), model, matches=MATCHES, refuses={"linear_8": "is too small"})


def test_a_missing_effect_fails(model: Model) -> None:
    with pytest.raises(AssertionError, match="did not have the effect"):
        check_pass(SpellOut(), model, matches=MATCHES, effect=calls(7))


def test_a_pass_that_matches_itself_again_fails_unless_that_is_meant(model: Model) -> None:
    with pytest.raises(AssertionError, match="not idempotent: a second run matches"):
        check_pass(Repeats(), model, matches=MATCHES)
    check_pass(Repeats(), model, matches=MATCHES, idempotent=False)


def test_a_lost_source_line_fails(model: Model) -> None:
    with pytest.raises(AssertionError, match=r"without a source line; give editor\.call like=node"):
        check_pass(LosesLines(), model, matches=MATCHES)


def test_a_wrong_value_fails(model: Model) -> None:
    with pytest.raises(VerificationError, match="after pass spell-out the model computes something else: random ids"):
        check_pass(Scales(), model, matches=MATCHES, idempotent=False)


def test_an_oracle_serves_several_checks(model: Model) -> None:
    oracle = default_oracle(model)
    first = check_pass(SpellOut(), model, matches=MATCHES, oracle=oracle)
    second = check_pass(Repeats(), model, matches=MATCHES, idempotent=False, oracle=oracle)
    assert [one.trace for one in first.traces] == [one.trace for one in second.traces]


def test_the_default_model_sees() -> None:
    model = default_model()
    assert model.metadata.image is not None
    assert {role.kind for entry in model.entry_points for role in entry.roles} >= {"encoder", "prefill", "decode"}
