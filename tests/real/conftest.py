"""Whole real models: the references of every artifact made from them."""

from pathlib import Path

import pytest

from tests import assets
from tests.real.smollm2 import CONTEXT
from triptych.compiler.adapters.hugging_face import load
from triptych.compiler.model import Model


@pytest.fixture(scope="session")
def smollm2_model(smollm2: Path) -> Model:
    """SmolLM2-135M-Instruct, described."""
    return load(smollm2, max_context=CONTEXT)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M, whole."""
    return assets.gemma3_checkpoint()


@pytest.fixture(scope="session")
def gemma3_cut() -> Path:
    """The first six layers of Gemma-3-270M: five with a window, one without."""
    return assets.gemma3_cut(layers=6)
