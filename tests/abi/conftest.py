"""Programs with the ABI `executorch-llm`, each exported once for all workers of a run."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

import triptych
from tests.abi.models import tiny_text_model
from tests.conftest import DEMO_CONTEXT, SMOLLM2_CONTEXT
from triptych.compiler.model import Model

Export = Callable[..., Path]


@pytest.fixture(scope="session")
def export_for_runners(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function (name, model, options of `triptych.export`) that exports once and returns the folder."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def export(name: str, model: Path | Model, *, abi: str = "executorch-llm", max_context: int | None = None) -> Path:
        out = shared / f"{name}-{abi}"
        with FileLock(f"{out}.lock"):
            if not out.exists():
                triptych.export(model, out=out, target="xnnpack", abi=abi, max_context=max_context)
        return out

    return export


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The tiny model with a tokenizer of letters."""
    return tiny_text_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tiny_pte(tiny_model: Model, export_for_runners: Export) -> Path:
    """The tiny model for `TextLLMRunner`; a few seconds."""
    return export_for_runners("tiny", tiny_model)


@pytest.fixture(scope="session")
def demo_pte(demo_checkpoint: Path, export_for_runners: Export) -> Path:
    """The embedded model for `MultimodalRunner`; half a minute."""
    return export_for_runners("demo", demo_checkpoint, max_context=DEMO_CONTEXT)


@pytest.fixture(scope="session")
def smollm2_cut_pte(smollm2_cut: Path, export_for_runners: Export) -> Path:
    """Four layers of SmolLM2 for `TextLLMRunner`."""
    return export_for_runners("smollm2-cut", smollm2_cut, max_context=SMOLLM2_CONTEXT)
