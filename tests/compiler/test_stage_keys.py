"""Keys of stages: equal for equal things in any process, another for whatever could change a stage."""

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler import tiny
from tests.compiler.cached import PIPELINE, SCALE, keys_of, other_process, with_passes, write_module
from triptych.compiler import stage_keys
from triptych.compiler.model import Model
from triptych.compiler.pipeline import Pipeline, as_pipeline
from triptych.compiler.stage_keys import step_keys


def _nudged(model: Model, name: str) -> Model:
    with torch.no_grad():
        model.module.get_parameter(name).view(-1)[-1] += 1e-6
    return model


def _set(model: Model, module: str, name: str, value: object) -> Model:
    setattr(model.module.get_submodule(module), name, value)
    return model


def _hooked(model: Model) -> Model:
    model.module.get_submodule("norm").register_forward_hook(lambda _module, _inputs, output: output * 2)
    return model


def _embed_scaled(factor: float) -> Callable[[Any, Tensor], Tensor]:
    def embed(module: Any, tokens: Tensor) -> Tensor:
        return factor * tiny.embed(module, tokens)

    return embed


CHANGES: dict[str, Callable[[Model], Model]] = {
    "the last bit of a weight": lambda model: _nudged(model, "norm.bias"),
    "a weight of its own in place of a tied one": lambda model: _set(
        model, "head", "weight", torch.nn.Parameter(model.module.get_parameter("head.weight").detach().clone())
    ),
    "a plain attribute": lambda model: _set(model, "norm", "eps", 1e-4),
    "another class": lambda model: _set(model, "blocks.0", "up", torch.nn.utils.skip_init(torch.nn.Linear, 32, 64)),
    "another dtype": lambda model: replace(model, module=model.module.double()),
    "a buffer": lambda model: _set(model, "norm", "extra", torch.nn.Buffer(torch.zeros(1))),
    "a hook": _hooked,
    "training": lambda model: replace(model, module=model.module.train()),
    "metadata": lambda model: replace(model, metadata=replace(model.metadata, eos_ids=(2,))),
    "an entry point's code": lambda model: tiny.with_entry_point(model, "token_embedding", forward=_embed_scaled(1.0)),
    "an entry point's role": lambda model: tiny.with_entry_point(model, "decode", roles=frozenset()),
    "an entry point's inputs": lambda model: tiny.with_entry_point(model, "decode", inputs=()),
}


def test_equal_models_have_equal_keys_and_every_step_its_own() -> None:
    keys = keys_of()
    assert keys == keys_of(tiny.tiny(layers=1))
    assert len(set(keys)) == 3


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_the_model_changes_every_key(change: Callable[[Model], Model]) -> None:
    assert set(keys_of()).isdisjoint(keys_of(change(tiny.tiny(layers=1))))


def test_what_an_entry_point_closes_over_is_told_apart() -> None:
    keys = [
        keys_of(tiny.with_entry_point(tiny.tiny(layers=1), "token_embedding", forward=_embed_scaled(factor)))
        for factor in (1.0, 1.0, 2.0)
    ]
    assert keys[0] == keys[1]
    assert set(keys[0]).isdisjoint(keys[2])


@pytest.mark.parametrize(
    ("pipeline", "same"),
    [
        ("static-kv-cache{max=23},swap-sdpa,capture,last-token-logits,expand-tanh-gelu", 0),
        ("static-kv-cache,capture,last-token-logits,expand-tanh-gelu", 0),
        ("static-kv-cache,swap-sdpa,capture,expand-tanh-gelu,last-token-logits", 1),
        ("static-kv-cache,swap-sdpa,capture,last-token-logits,legalize-aten", 2),
    ],
)
def test_a_change_of_the_pipeline_keeps_the_keys_before_it(pipeline: str, same: int) -> None:
    before, after = keys_of(), keys_of(pipeline=pipeline)
    assert after[:same] == before[:same]
    assert set(after[same:]).isdisjoint(before)


def test_versions_and_triptychs_own_source_are_in_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys_of()
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    older = keys_of()
    monkeypatch.undo()
    monkeypatch.setattr(stage_keys, "OWN_SOURCES", "another")
    assert len({*before, *older, *keys_of()}) == 9


def test_hooks_are_told_apart_by_what_they_do_and_not_by_torchs_count_of_them() -> None:
    first = keys_of(_hooked(tiny.tiny(layers=1)))
    assert first == keys_of(_hooked(tiny.tiny(layers=1)))


def test_the_number_of_threads_is_in_no_key() -> None:
    before, threads = keys_of(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert keys_of() == before
    finally:
        torch.set_num_threads(threads)


def test_a_module_that_a_pass_uses_is_in_its_key(tmp_path: Path) -> None:
    user = SCALE.replace("def amount(factor):\n    return factor", "from an_amount import amount")
    keys = []
    for body in ("return factor", "return factor + 1"):
        write_module(tmp_path, f"def amount(factor):\n    {body}\n", "an_amount")
        keys.append(keys_of(pipeline=with_passes(write_module(tmp_path, user).Scale())))
    assert keys[0][:2] == keys[1][:2]
    assert keys[0][2] != keys[1][2]


def test_code_that_is_loaded_counts_and_not_only_what_its_file_says_now(tmp_path: Path) -> None:
    """Edited and not imported anew: what runs is the old code, and must not be taken for the new."""
    changed = SCALE.replace("return factor", "return 5 * factor")
    path = Path(str(write_module(tmp_path, SCALE).__file__))
    path.write_text(changed, encoding="utf-8")
    stale = keys_of(pipeline=with_passes(sys.modules["a_pass_of_mine"].Scale()))
    assert stale[2] != keys_of(pipeline=with_passes(write_module(tmp_path, changed).Scale()))[2]


@pytest.mark.slow
def test_keys_are_the_same_in_another_process(demo_model: Model) -> None:
    """A real checkpoint's module holds sets, hashes and functions, which must not depend on a process's seed."""
    call = """
from importlib.resources import files
from triptych.compiler.adapters.hugging_face import load
from tests.compiler.cached import keys_of
import pathlib
print(keys_of(load(pathlib.Path(str(files("triptych.demo") / "model")), max_context=256)))
"""
    assert other_process(call).communicate()[0].strip() == str(keys_of(demo_model))


def test_what_cannot_be_told_apart_is_named_and_not_cached() -> None:
    model = tiny.tiny(layers=1)
    model.module.guard = threading.Lock()  # type: ignore[assignment]
    reasons: list[str] = []
    assert step_keys(model, Pipeline(), as_pipeline(PIPELINE), reasons.append) == []
    assert len(reasons) == 1
    assert reasons[0].startswith("nothing is cached from capture on: a lock says nothing of itself (cannot pickle")
