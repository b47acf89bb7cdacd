"""The manager holds every pass to its contract; each wrong pass below breaks one promise."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest
import torch
from torch import nn

from tests.compiler import tiny
from triptych.compiler import manager
from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import GraphPass, MatchLog, Pass, ProgramPass, SourceTransform
from triptych.compiler.program import Method, Program
from triptych.compiler.roles import Role
from triptych.compiler.text import program_text
from triptych.errors import PipelineError, VerificationError


class Named(Pass):
    name: ClassVar[str] = "wrong-pass"


class ClaimsTooMuch(Named, GraphPass):
    """Reports a match and changes nothing."""

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        log.match("somewhere")


class MatchesNothing(Named, GraphPass):
    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        log.refused("linear", "is not to my taste")


class MayMatchNothing(Named, GraphPass):
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        return


class HidesItsChange(Named, GraphPass):
    """Changes the graph and reports no match."""

    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        for node in editor.calls(torch.ops.aten.gelu.default):
            node.kwargs = {}


class BreaksALink(Named, ProgramPass):
    """Gives another name to an output that somebody takes."""

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        log.match("token_embedding")
        method = program.methods["token_embedding"]
        renamed = dataclasses.replace(method.outputs[0], name="rows")
        return program.with_methods(
            {**program.methods, "token_embedding": dataclasses.replace(method, outputs=(renamed,))}
        )


class BreaksTheLogits(Named, GraphPass):
    """Returns every other logit."""

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        if Role("decode") in method.roles and log.match("logits"):
            with editor.graph.inserting_before(editor.graph.output_node()):
                half = editor.call(torch.ops.aten.slice.Tensor, editor.user_outputs[0], -1, 0, 24)
            editor.replace_user_output(0, half)


class Fails(Named, GraphPass):
    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        raise KeyError("a table")


class SourceFails(Named, SourceTransform):
    def transform(self, model: Model, log: MatchLog) -> Model:
        raise ZeroDivisionError


class SourceClaimsTooMuch(Named, SourceTransform):
    def transform(self, model: Model, log: MatchLog) -> Model:
        log.match("blocks.0")
        return model


class ReplacesNorms(Named, SourceTransform):
    def transform(self, model: Model, log: MatchLog) -> Model:
        model.module.norm = nn.Identity()
        log.match("norm")
        return model


class ScalesAWeight(Named, SourceTransform):
    """Changes values and no structure, in a new parameter."""

    def transform(self, model: Model, log: MatchLog) -> Model:
        head = model.module.get_submodule("head")
        head.weight = nn.Parameter(head.get_parameter("weight") * 2)
        log.match("head")
        return model


@dataclass(frozen=True)
class DropsMethods(ProgramPass):
    """Keeps what it is told to keep."""

    name: ClassVar[str] = "drop-methods"
    keep: tuple[str, ...] = ()

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        kept: Mapping[str, Method] = {
            name: one for name, one in program.methods.items() if name in self.keep or not log.match(name)
        }
        return program.with_methods(kept)


def test_a_pass_that_claims_a_match_and_changes_nothing_fails_by_name(tiny_program: Program) -> None:
    with pytest.raises(VerificationError, match="wrong-pass reports 3 matches and changed nothing"):
        manager.run_program(tiny_program, [ClaimsTooMuch()])


def test_a_source_pass_that_claims_a_match_and_changes_nothing_fails_by_name() -> None:
    with pytest.raises(VerificationError, match="wrong-pass reports 1 matches and changed nothing"):
        manager.run_source(tiny.tiny(layers=1), [SourceClaimsTooMuch()])


def test_a_pass_that_matches_nothing_fails_with_its_reasons(tiny_program: Program) -> None:
    with pytest.raises(PipelineError, match=r"wrong-pass matched nothing: .*linear: is not to my taste"):
        manager.run_program(tiny_program, [MatchesNothing()])


def test_a_pass_that_may_match_nothing_leaves_the_very_program(tiny_program: Program) -> None:
    program, (result,) = manager.run_program(tiny_program, [MayMatchNothing()])
    assert program is tiny_program
    assert (result.matches, result.changed) == ((), False)


def test_a_change_without_a_match_is_not_taken_silently(tiny_program: Program) -> None:
    with pytest.raises(VerificationError, match="wrong-pass changed the graph of prefill and reported no match"):
        manager.run_program(tiny_program, [HidesItsChange()])


@pytest.mark.parametrize("wrong", [BreaksALink(), BreaksTheLogits()], ids=lambda one: type(one).__name__)
def test_a_pass_that_breaks_the_program_fails_by_name(tiny_program: Program, wrong: GraphPass | ProgramPass) -> None:
    with pytest.raises(VerificationError, match="pass wrong-pass broke the program"):
        manager.run_program(tiny_program, [wrong])


@pytest.mark.parametrize(
    ("wrong", "kind"), [(Fails(), "KeyError"), (SourceFails(), "ZeroDivisionError")], ids=["graph", "source"]
)
def test_a_pass_that_raises_fails_by_name(tiny_program: Program, wrong: Pass, kind: str) -> None:
    run = (
        partial(manager.run_source, tiny.tiny(layers=1))
        if isinstance(wrong, SourceTransform)
        else partial(manager.run_program, tiny_program)
    )
    with pytest.raises(VerificationError, match=f"pass wrong-pass failed with {kind}"):
        run([wrong])  # type: ignore[list-item]


def test_a_failed_pass_leaves_the_program_it_was_given(tiny_program: Program) -> None:
    before = program_text(tiny_program)
    for wrong in (BreaksTheLogits(), BreaksALink(), HidesItsChange()):
        with pytest.raises(VerificationError):
            manager.run_program(tiny_program, [wrong, ClaimsTooMuch()])
    assert program_text(tiny_program) == before


@pytest.mark.parametrize("change", [ReplacesNorms(), ScalesAWeight()], ids=lambda one: type(one).__name__)
def test_a_source_pass_changes_its_own_copy(change: SourceTransform) -> None:
    model = tiny.tiny(layers=1)
    tokens = torch.randint(0, tiny.VOCABULARY, (1, 5))
    wanted = model.module(tokens)
    changed, (result,) = manager.run_source(model, [change])
    assert result.changed
    assert not torch.allclose(changed.module(tokens), wanted)
    torch.testing.assert_close(model.module(tokens), wanted, rtol=0, atol=0)


def test_a_program_pass_may_drop_methods_and_state_goes_with_them(tiny_program: Program) -> None:
    program, (result,) = manager.run_program(tiny_program, [DropsMethods(keep=("token_embedding",))])
    assert [match.where for match in result.matches] == ["prefill", "decode"]
    assert (list(program.methods), dict(program.state)) == (["token_embedding"], {})


def test_dropping_a_method_that_feeds_another_breaks_the_program(tiny_program: Program) -> None:
    with pytest.raises(VerificationError, match=r"drop-methods broke .*token_embedding\.embeds, which does not exist"):
        manager.run_program(tiny_program, [DropsMethods(keep=("prefill", "decode"))])


def test_the_manager_reports_names_in_order_and_measures_time(tiny_program: Program) -> None:
    heard: list[str] = []
    _, results = manager.run_program(
        tiny_program, [MayMatchNothing(), DropsMethods(keep=("token_embedding",))], heard.append
    )
    assert heard == ["wrong-pass", "drop-methods"] == [result.name for result in results]
    assert all(0 <= result.seconds < 60 for result in results)
