"""Minimizing keeps few layers and a short conversation on which the same pass is guilty."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.compiler import tiny
from tests.oracle.searches import guilty, pipeline_of
from tests.oracle.wrong_passes import CountSlots, RoundTrip
from triptych.compiler.editing import storage_identity
from triptych.compiler.failing_case import load_model
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.program_runner import ModelRunner
from triptych.compiler.reproducer import minimize
from triptych.compiler.shrinking import beginning, cut_stacks, in_few_steps, plan_of, stacks
from triptych.compiler.trace import CallTrace, Step
from triptych.compiler.trace_plans import make_plans, subject_of

# ---------------------------------------------------------------------------------------------------- minimizing


def oracle_of(model: Model) -> Oracle:
    return Oracle(model, make_plans(subject_of(model), tokens=3, prompt_lengths=(1, 9)))


@pytest.mark.parametrize(("wrong_at", "kept"), [("blocks.0", 1), ("blocks.1", 2)])
def test_few_layers_and_a_short_conversation_remain(wrong_at: str, kept: int) -> None:
    model = tiny.tiny(layers=3)
    pipeline = pipeline_of(CountSlots("decode", wrong_at))
    oracle = oracle_of(model)
    heard: list[str] = []
    smaller, culprit, shorter = minimize(model, pipeline, guilty(model, oracle, pipeline), oracle, heard.append)
    assert len(smaller.module.get_submodule("blocks")._modules) == kept
    assert (culprit.step, culprit.method, culprit.match and culprit.match.layer) == ("count-slots", "decode", wrong_at)
    assert shorter.model is smaller
    (plan,) = shorter.plans
    assert plan.steps == (Step("prefill", 1), Step("decode", 1))
    assert heard[0] == "search on 1 of 3 layers"
    assert len(model.module.get_submodule("blocks")._modules) == 3


def test_what_cannot_be_smaller_stays() -> None:
    model = tiny.tiny(layers=1)
    oracle = Oracle(model, [plan_of(tiny.trace(("prefill", 1)))])
    pipeline = pipeline_of(RoundTrip("prefill", "blocks.0"))
    culprit = guilty(model, oracle, pipeline)
    same, found, shorter = minimize(model, pipeline, culprit, oracle)
    assert same is model
    assert (found.step, found.match) == (culprit.step, culprit.match)
    assert [plan.steps for plan in shorter.plans] == [(Step("prefill", 1),)]


def test_a_failure_at_a_position_keeps_the_conversation_up_to_it(module_of: Callable[[str], ModuleType]) -> None:
    """The pass drops what is known of position 5 and later; four positions would not show it."""
    text = """
class Forgets(GraphPass):
    name: ClassVar[str] = "forgets"
    def rewrite(self, editor, method, log):
        for node in editor.calls(torch.ops.aten.embedding.default):
            positions = node.args[1]
            if "prefill" in map(str, method.roles) and log.match(node):
                with editor.graph.inserting_before(node):
                    clamped = editor.call(torch.ops.aten.clamp.default, positions, 0, 4, like=node)
                node.update_arg(1, clamped)
"""
    model = tiny.tiny(layers=1)
    oracle = oracle_of(model)
    pipeline = pipeline_of(module_of(text).Forgets())
    _, _, shorter = minimize(model, pipeline, guilty(model, oracle, pipeline), oracle)
    (plan,) = shorter.plans
    assert plan.steps == (Step("prefill", 6),)


# ---------------------------------------------------------------------------------------------------- shrinking


def test_stacks_are_lists_of_blocks_of_one_class(demo_model: Model) -> None:
    found = {name: len(stack) for name, stack in stacks(demo_model).items()}
    assert found == {"model.vision_tower.encoder.layers": 3, "model.language_model.layers": 4}


def test_lists_within_lists_are_no_stacks_and_mixed_lists_neither() -> None:
    model = tiny.tiny(layers=2)
    block = model.module.get_submodule("blocks.0")
    block.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model.module.mixed = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.ReLU()])
    assert list(stacks(model)) == ["blocks"]


def test_a_cut_model_runs_its_first_layers_on_the_same_tensors(demo_model: Model) -> None:
    cut = cut_stacks(demo_model, 2)
    assert {name: len(stack) for name, stack in stacks(cut).items()} == {
        "model.vision_tower.encoder.layers": 2,
        "model.language_model.layers": 2,
    }
    module: Any = cut.module
    assert module.config.text_config.num_hidden_layers == module.model.language_model.config.num_hidden_layers == 2
    assert module.config.vision_config.num_hidden_layers == 2
    own: Any = demo_model.module
    assert own.config.text_config.num_hidden_layers == 4
    assert cut.metadata.provenance == {**demo_model.metadata.provenance, "layers": "2"}
    kept = dict(cut.module.named_parameters())
    assert all(storage_identity(kept[name]) == storage_identity(own.get_parameter(name)) for name in kept)
    outputs = cut.eager(cut.module, torch.arange(5), ()) if cut.eager else None
    whole = demo_model.eager(own, torch.arange(5), ()) if demo_model.eager else None
    assert outputs is not None
    assert whole is not None
    assert not torch.allclose(outputs.logits, whole.logits)


def test_the_script_of_a_reproducer_cuts_a_checkpoint_as_far(demo_checkpoint: Path) -> None:
    model = load_model(str(demo_checkpoint), "static-kv-cache{max=32}", max_context=64, layers=1)
    assert {len(stack) for stack in stacks(model).values()} == {1}
    assert model.metadata.max_context == 32
    assert ModelRunner(model).has_cache


def test_components_within_layers_that_go_are_left_out() -> None:
    model = tiny.tiny(layers=2)
    components = {"decoder": ("blocks.0", "blocks.1"), "lm_head": ("head",)}
    described = dataclasses.replace(model, metadata=dataclasses.replace(model.metadata, components=components))
    assert cut_stacks(described, 1).metadata.components == {"decoder": ("blocks.0",), "lm_head": ("head",)}


def test_the_beginning_of_a_conversation_splits_no_picture() -> None:
    pictures = (torch.zeros(1), torch.ones(1))
    trace = CallTrace("two pictures", torch.tensor([1, 9, 9, 2, 9, 9, 4]), (Step("prefill", 7),), pictures, 9)
    begun = [beginning(trace, length) for length in range(1, 8)]
    assert [one and len(one.pixel_values) for one in begun] == [0, None, 1, 1, None, 2, 2]
    last = begun[2]
    assert last is not None
    assert last.tokens.tolist() == [1, 9, 9]
    assert last.name == "the first 3 positions of 'two pictures'"
    assert [one.steps for one in in_few_steps(last)] == [(Step("prefill", 3),)]


def test_few_steps_are_one_prefill_and_one_more_call() -> None:
    assert [one.steps for one in in_few_steps(tiny.trace(("prefill", 2), ("decode", 2)))] == [
        (Step("prefill", 4),),
        (Step("prefill", 3), Step("decode", 1)),
        (Step("prefill", 3), Step("prefill", 1)),
    ]
    assert [one.steps for one in in_few_steps(tiny.trace(("decode", 1)))] == [(Step("prefill", 1),)]
