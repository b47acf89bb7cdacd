"""The default model, captured once, with short conversations to hold it to; and one thread.

The tensors here are so small that a second thread only waits: on a busy machine tests take ten times as long with it.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest
import torch

from tests.compiler import tiny
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.program import Program
from triptych.compiler.stages import Source
from triptych.compiler.trace_plans import make_plans, subject_of


@pytest.fixture(scope="package", autouse=True)
def _one_thread(_torch_threads: None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_oracle(demo_model: Model) -> Oracle:
    """The references of the default model: text, random ids, a second turn, images."""
    return Oracle(demo_model, make_plans(subject_of(demo_model), tokens=4, prompt_lengths=(1, 17)))


@pytest.fixture(scope="session")
def demo_program(demo_model: Model) -> Program:
    """The default model with its cache, captured; programs are immutable, so one serves all."""
    return Source(demo_model).transform("static-kv-cache,swap-sdpa").capture().program


@pytest.fixture(scope="session")
def tiny_model() -> Model:
    """The hand-written model, three layers."""
    return tiny.tiny(layers=3)


@pytest.fixture(scope="session")
def tiny_oracle(tiny_model: Model) -> Oracle:
    """Its references: random ids after two prompts, and a second turn."""
    return Oracle(tiny_model, make_plans(subject_of(tiny_model), tokens=3, prompt_lengths=(1, 9)))


@pytest.fixture(scope="session")
def tiny_captured(tiny_model: Model) -> Program:
    """The hand-written model with its cache, captured."""
    return tiny.captured(tiny_model).program


HEADER: Final = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from triptych.compiler.pass_kinds import GraphPass, SourceTransform
"""


@pytest.fixture
def module_of(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], ModuleType]:
    """Return a function that imports a pass from a file, as a third party's package would."""

    def make(text: str) -> ModuleType:
        name = f"passes_of_{request.node.originalname}"
        file = tmp_path / f"{name}.py"
        file.write_text(HEADER + text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        request.addfinalizer(lambda: sys.modules.pop(name))
        spec.loader.exec_module(module)
        return module

    return make
