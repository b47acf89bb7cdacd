"""The hand-written model, captured once for all tests that only look at it."""

import pytest

from tests.compiler import tiny
from triptych.compiler.program import Program


@pytest.fixture(scope="session")
def tiny_program() -> Program:
    """The tiny model through its default passes, two layers; programs are immutable, so one serves all."""
    return tiny.captured().rewrite("last-token-logits").program
