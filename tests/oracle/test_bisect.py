"""Bisection finds the first guilty step of a pipeline, and its method and match as far as it can be taken apart."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.compiler import tiny
from tests.compiler.test_manager import BreaksTheLogits, Fails
from tests.oracle.right_passes import FuseLinears, LinearAsMatmul
from tests.oracle.wrong_passes import CountSlots, PrefillOnly, RoundTrip, SplitState
from triptych.compiler.bisect import Culprit, Part, Stage, apply_step, bisect, steps_of
from triptych.compiler.editing import GraphEditor
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import GraphPass, MatchLog, Pass, SourceTransform
from triptych.compiler.pipeline import Pipeline, as_pipeline, build
from triptych.compiler.program import Method, Program
from triptych.compiler.properties import KV_CACHE, Property
from triptych.compiler.provenance import layer_of
from triptych.compiler.stages import Source
from triptych.compiler.trace_plans import make_plans, subject_of
from triptych.errors import UsageError

aten = torch.ops.aten
SOURCE = "static-kv-cache,swap-sdpa"


@dataclass(frozen=True)
class EditGelu(GraphPass):
    """Does `edit` to every GELU; the options say where it goes wrong."""

    name: ClassVar[str] = "edit-gelu"

    role: str = "decode"
    layer: str = "blocks.1"

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        for node in editor.calls(aten.gelu.default):
            if log.match(node):
                is_here = self.role in map(str, method.roles) and layer_of(node) == self.layer
                self.edit(editor, node, 1.01 if is_here else 1.0)

    def edit(self, editor: GraphEditor, node: Node, factor: float) -> None:
        with editor.graph.inserting_after(node):
            scaled = editor.call(aten.mul.Tensor, node, factor, like=node)
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)


class RaisesAtOne(EditGelu):
    name: ClassVar[str] = "raises-at-one"

    def edit(self, editor: GraphEditor, node: Node, factor: float) -> None:
        super().edit(editor, node, factor)
        if factor != 1.0:
            raise ZeroDivisionError("at the second layer")


class FailsWhenRun(EditGelu):
    """Right for torch's shapes, and an index error in every call."""

    name: ClassVar[str] = "fails-when-run"

    def edit(self, editor: GraphEditor, node: Node, factor: float) -> None:
        with editor.graph.inserting_after(node):
            index = editor.call(aten.full.default, [1], 0 if factor == 1.0 else 7, dtype=torch.int64, like=node)
        with editor.graph.inserting_after(index):
            picked = editor.call(aten.index_select.default, node, 0, index, like=node)
        node.replace_all_uses_with(picked, delete_user_cb=lambda user: user is not picked)


class Indivisible(EditGelu):
    name: ClassVar[str] = "indivisible"
    indivisible: ClassVar[bool] = True


@dataclass(frozen=True)
class RoundWeights(SourceTransform):
    """Makes every linear layer's weight anew; the one of `wrong` comes out too large."""

    name: ClassVar[str] = "round-weights"

    wrong: str = "blocks.1.down"

    def transform(self, model: Model, log: MatchLog) -> Model:
        for name, module in model.module.named_modules():
            if isinstance(module, nn.Linear) and name != "head" and log.match(name):
                module.weight = nn.Parameter(module.weight.detach() * (1.01 if name == self.wrong else 1.0))
        return model


class PromisesACache(RoundWeights):
    name: ClassVar[str] = "promises-a-cache"
    ensures: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})


def pipeline_of(*passes: Pass, before: str = "last-token-logits", after: str = "legalize-aten") -> Pipeline:
    """Passes on a captured program, between right ones."""
    program = (*as_pipeline(f"capture,{before}").program, *passes, *as_pipeline(f"capture,{after}").program)
    return Pipeline(program=program)  # type: ignore[arg-type]


def found(culprit: Culprit | None) -> tuple[str, int, str | None, str | None]:
    """Return step, index, method and layer of a culprit."""
    assert culprit is not None
    return culprit.step, culprit.index, culprit.method, culprit.match.layer if culprit.match else None


def test_nothing_is_guilty_where_all_is_right(tiny_model: Model, tiny_oracle: Oracle) -> None:
    pipeline = as_pipeline(f"{SOURCE},capture,last-token-logits,expand-tanh-gelu,legalize-aten")
    heard: list[str] = []
    assert bisect(tiny_model, pipeline, tiny_oracle, heard.append) is None
    assert heard == [
        *(f"run {name}" for name in str(pipeline).split(",")),
        "check after legalize-aten",
    ]


def test_an_empty_pipeline_is_refused(tiny_model: Model, tiny_oracle: Oracle) -> None:
    with pytest.raises(UsageError, match="the pipeline is empty; there is nothing to search"):
        bisect(tiny_model, Pipeline(), tiny_oracle)


def test_a_start_that_is_wrong_already_is_refused(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    wrong = apply_step(CountSlots("decode", "blocks.1"), tiny_captured)
    with pytest.raises(UsageError, match=r"the traces fail before any pass: .*relative .*; begin the search earlier"):
        bisect(wrong, pipeline_of(), tiny_oracle)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_wrong_value_is_found_at_its_match(role: str, tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(EditGelu(role)), tiny_oracle)
    assert found(culprit) == ("edit-gelu", 1, role, "blocks.1")
    assert culprit is not None
    assert culprit.match is not None
    assert culprit.match.where == "gelu_1"
    assert (culprit.match.line or "").startswith("tiny.py:")
    assert str(culprit).startswith(f"edit-gelu (step 2), in {role}, at gelu_1, blocks.1, tiny.py:")


def test_the_part_found_is_the_least_that_is_wrong(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(EditGelu()), tiny_oracle)
    assert culprit is not None
    assert culprit.part == Part("decode", 2)
    stage = Stage(culprit.before, tiny_oracle)
    assert stage.after(culprit.guilty, Part("decode", 2).select).problem() is not None
    assert stage.after(culprit.guilty, Part("decode", 1).select).problem() is None
    assert stage.after(culprit.guilty, Part("prefill").select).problem() is None


def test_the_first_of_two_wrong_passes_is_found(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    pipeline = pipeline_of(LinearAsMatmul(), EditGelu("prefill", "blocks.2"), CountSlots("decode", "blocks.0"))
    assert found(bisect(tiny_captured, pipeline, tiny_oracle)) == ("edit-gelu", 2, "prefill", "blocks.2")


def test_a_wrong_pass_before_one_that_raises_is_found(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    pipeline = pipeline_of(EditGelu("prefill", "blocks.2"), RaisesAtOne())
    assert found(bisect(tiny_captured, pipeline, tiny_oracle)) == ("edit-gelu", 1, "prefill", "blocks.2")


def test_a_pass_that_raises_is_found_at_the_match_it_raises_at(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(LinearAsMatmul(), RaisesAtOne()), tiny_oracle)
    assert found(culprit) == ("raises-at-one", 2, "decode", "blocks.1")
    assert culprit is not None
    assert "failed with ZeroDivisionError: at the second layer" in culprit.reason


def test_a_call_that_fails_when_it_is_run_is_found_too(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(FailsWhenRun()), tiny_oracle)
    assert found(culprit) == ("fails-when-run", 1, "decode", "blocks.1")
    assert culprit is not None
    assert culprit.reason.startswith("decode fails on inputs of {'tokens': [1, 1], 'start_pos': [1]}: index")


def test_a_broken_program_is_found(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(LinearAsMatmul(), BreaksTheLogits()), tiny_oracle)
    assert found(culprit) == ("wrong-pass", 2, "decode", None)
    assert culprit is not None
    assert culprit.match is not None
    assert culprit.match.where == "logits"
    assert "needs an output 'logits' over 48 tokens" in culprit.reason


def test_a_pass_that_matches_nothing_is_found_in_no_method(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(FuseLinears()), tiny_oracle)
    assert found(culprit) == ("fuse-linears", 1, None, None)
    assert culprit is not None
    assert culprit.part is None
    assert "matched nothing" in culprit.reason


def test_a_pass_that_raises_whatever_it_may_do_is_found_in_no_method(
    tiny_captured: Program, tiny_oracle: Oracle
) -> None:
    culprit = bisect(tiny_captured, pipeline_of(LinearAsMatmul(), Fails()), tiny_oracle)
    assert found(culprit) == ("wrong-pass", 2, None, None)
    assert culprit is not None
    assert "failed with KeyError" in culprit.reason


def test_split_state_is_found_without_a_method(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(SplitState()), tiny_oracle)
    assert found(culprit) == ("split-state", 1, None, None)
    assert culprit is not None
    assert culprit.match is not None
    assert culprit.match.where == "decode"


def test_a_pass_that_is_not_uniform_is_named_whole(tiny_oracle: Oracle) -> None:
    """No part of it is wrong by itself."""

    class ShortOnly(PrefillOnly):
        def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
            if "prefill" in map(str, method.roles):
                EditGelu("nowhere").rewrite(editor, method, log)

    program = tiny.captured(tiny_oracle.model).program
    culprit = bisect(program, pipeline_of(ShortOnly()), tiny_oracle)
    assert found(culprit) == ("prefill-only", 1, "decode", None)
    assert culprit is not None
    assert culprit.part is None
    assert culprit.match is not None
    assert culprit.match.where == "blocks.0"


def test_an_indivisible_pass_is_named_with_its_method_only(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    culprit = bisect(tiny_captured, pipeline_of(Indivisible()), tiny_oracle)
    assert found(culprit) == ("indivisible", 1, "decode", None)
    assert culprit is not None
    assert (culprit.match, culprit.part) == (None, Part("decode"))


@pytest.mark.parametrize("before", ["", "static-kv-cache"])
def test_a_source_transform_is_found_at_its_match(before: str, tiny_model: Model, tiny_oracle: Oracle) -> None:
    """Without a cache each trace is one prefill; with it, the first wrong output is prefill's as well."""
    first = as_pipeline(before).source if before else ()
    culprit = bisect(tiny_model, build([*first, RoundWeights()]), tiny_oracle)
    assert found(culprit) == ("round-weights", len(first), "prefill", "blocks.1")
    assert culprit is not None
    assert culprit.match is not None
    assert culprit.match.where == "blocks.1.down"
    assert isinstance(culprit.before, Model)


def test_a_capture_that_computes_something_else_is_guilty(tiny_model: Model) -> None:
    def decode(module: Any, tokens: Tensor, start_pos: Tensor) -> Tensor:
        return tiny.decode(module, tokens, start_pos) * (1.01 if torch.compiler.is_compiling() else 1.0)

    model = tiny.with_entry_point(tiny_model, "decode", forward=decode)
    culprit = bisect(model, as_pipeline(f"{SOURCE},capture,last-token-logits"), oracle_of(model))
    assert found(culprit) == ("capture", 2, "decode", None)


def test_a_capture_that_fails_is_guilty(tiny_model: Model) -> None:
    def decode(module: Any, tokens: Tensor, start_pos: Tensor) -> Tensor:
        start = torch.tensor([int(start_pos)])
        return tiny.decode(module, tokens, start) if start_pos > 0 else tiny.decode(module, tokens, start) * 1.0

    model = tiny.with_entry_point(tiny_model, "decode", forward=decode)
    culprit = bisect(model, as_pipeline(f"{SOURCE},capture,last-token-logits"), oracle_of(model))
    assert found(culprit)[:2] == ("capture", 2)
    assert culprit is not None
    assert "entry point 'decode' of TinyModel does not export" in culprit.reason


def test_a_promise_of_a_source_transform_is_checked_at_the_capture(tiny_model: Model, tiny_oracle: Oracle) -> None:
    """As in an export: only a program can be asked for its cache."""
    pipeline = build([PromisesACache("nowhere"), None])
    culprit = bisect(tiny_model, pipeline, tiny_oracle)
    assert found(culprit)[:2] == ("capture", 1)
    assert culprit is not None
    assert "promises-a-cache ensures kv-cache, and after it prefill writes no row" in culprit.reason


def test_after_quantizing_the_reference_is_the_quantized_model(tiny_model: Model, tiny_oracle: Oracle) -> None:
    """Quantizing moves the logits further than any float tolerance, and is not what is wrong here."""
    start = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture"
    steps = steps_of(as_pipeline(start))
    assert bisect(tiny_model, build(steps), tiny_oracle) is None
    scaled = dataclasses.replace(EditGelu(), layer="blocks.2")
    large: Callable[..., None] = lambda self, editor, node, factor: EditGelu.edit(  # noqa: E731
        self, editor, node, 1.0 if factor == 1.0 else 3.0
    )
    wrong = type("Large", (EditGelu,), {"edit": large})(**vars(scaled))
    culprit = bisect(tiny_model, build([*steps, wrong]), tiny_oracle)
    assert found(culprit) == ("edit-gelu", 4, "decode", "blocks.2")


def test_a_tolerance_that_a_pass_declares_is_kept_to(tiny_captured: Program, tiny_oracle: Oracle) -> None:
    class Declared(RoundTrip):
        tolerances: ClassVar[Any] = {
            "float32": dataclasses.replace(RoundTrip.tolerances["float32"], relative=0.5, kl=1)
        }

    place = ("decode", "blocks.1", 0)
    assert bisect(tiny_captured, pipeline_of(RoundTrip(*place)), tiny_oracle) is not None
    assert bisect(tiny_captured, pipeline_of(Declared(*place)), tiny_oracle) is None


def oracle_of(model: Model) -> Oracle:
    return Oracle(model, make_plans(subject_of(model), tokens=3, prompt_lengths=(1, 9)))


def test_the_model_that_was_searched_is_as_it_was(tiny_model: Model, tiny_oracle: Oracle) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_model.module.state_dict().items()}
    bisect(tiny_model, build([*as_pipeline(SOURCE).source, RoundWeights(), None]), tiny_oracle)
    after = tiny_model.module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert Source(tiny_model).model.module is tiny_model.module
