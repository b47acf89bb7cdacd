"""Running pipelines with a stage cache over the tiny model, here and in another process."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from tests.compiler import tiny
from triptych.compiler import stage_keys
from triptych.compiler.manager import Instrument
from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import Pass
from triptych.compiler.pipeline import Pipeline, as_pipeline
from triptych.compiler.stage_cache import StageCache, run
from triptych.compiler.stage_keys import step_keys
from triptych.compiler.stages import Captured, Source
from triptych.compiler.text import program_text

ROOT = Path(__file__).parents[2]
PIPELINE = "static-kv-cache,swap-sdpa,capture,last-token-logits,expand-tanh-gelu"
QUANTIZED = "quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture,last-token-logits,legalize-executorch"
CACHED = ["capture (cached)", "last-token-logits (cached)", "expand-tanh-gelu (cached)"]
KEY = "0" * 40

SCALE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from triptych.compiler.pass_kinds import GraphPass

@dataclass(frozen=True)
class Scale(GraphPass):
    name: ClassVar[str] = "scale"
    factor: float = 2.0

    def rewrite(self, editor, method, log):
        for node in editor.calls(torch.ops.aten.gelu.default):
            if log.match(node):
                with editor.graph.inserting_after(node):
                    scaled = editor.call(torch.ops.aten.mul.Tensor, node, amount(self.factor), like=node)
                node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)

def amount(factor):
    return factor
"""


@dataclass(frozen=True)
class Run:
    """What a run gave, and what it reported."""

    captured: Captured
    lines: list[str]

    @property
    def text(self) -> str:
        return program_text(self.captured.program)


def run_once(
    folder: Path | None,
    pipeline: str | Pipeline = PIPELINE,
    model: Model | None = None,
    instruments: tuple[Instrument, ...] = (),
) -> Run:
    lines: list[str] = []
    source = Source(model or tiny.tiny(layers=1), report=lines.append, instruments=instruments)
    cache = None if folder is None else StageCache(folder)
    return Run(run(source, as_pipeline(pipeline), cache), lines)


def with_passes(*passes: Pass) -> Pipeline:
    beginning = as_pipeline("static-kv-cache,swap-sdpa,capture,last-token-logits")
    return replace(beginning, program=(*beginning.program, *passes))  # type: ignore[arg-type]


def keys_of(model: Model | None = None, pipeline: str | Pipeline = PIPELINE) -> list[str]:
    reasons: list[str] = []
    keys = step_keys(model or tiny.tiny(layers=1), Pipeline(), as_pipeline(pipeline), reasons.append)
    assert reasons == []
    return keys


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "entries").iterdir())


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != "CACHEDIR.TAG")


def write_module(folder: Path, text: str, name: str = "a_pass_of_mine") -> ModuleType:
    """Write a module and import it; where one of that name is there already, it takes its place."""
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = found = importlib.util.module_from_spec(spec)
    # Compiled code on disk is told from newer text by seconds, which are long here.
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(found)
    finally:
        sys.dont_write_bytecode = before
    return found


def other_process(call: str) -> subprocess.Popen[str]:
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
from triptych.compiler import stage_keys
stage_keys.OWN_SOURCES = {stage_keys.OWN_SOURCES!r}  # which someone may edit while the tests run
from tests.compiler.cached import run_once
def once(folder, pipeline):
    import pathlib
    done = run_once(pathlib.Path(folder), pipeline)
    print(json.dumps([done.lines, done.text]))
{call}
"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
