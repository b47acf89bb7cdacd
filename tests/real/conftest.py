"""The whole SmolLM2 as the reference of every artifact made from it."""

from pathlib import Path

import pytest

from tests.real.smollm2 import CONTEXT
from triptych.compiler.adapters.hugging_face import load
from triptych.compiler.model import Model


@pytest.fixture(scope="session")
def smollm2_model(smollm2: Path) -> Model:
    """SmolLM2-135M-Instruct, described."""
    return load(smollm2, max_context=CONTEXT)
