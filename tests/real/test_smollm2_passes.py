"""The whole SmolLM2-135M-Instruct through right passes, built-in ones and others: no false alarm."""

import dataclasses
from typing import Final

import pytest

from tests.oracle.right_passes import RIGHT
from triptych.compiler.instruments import NumericCheck
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.stages import Source
from triptych.compiler.trace_plans import make_plans, subject_of

pytestmark = [pytest.mark.real, pytest.mark.timeout(1800)]

SOURCE: Final = "static-kv-cache,swap-sdpa"


def checking(model: Model, tokens: int, *lengths: int) -> NumericCheck:
    """Text and random ids after prompts of these lengths, and a second turn; the whole context is another test's."""
    subject = dataclasses.replace(subject_of(model), max_context=64)
    return NumericCheck(Oracle(model, make_plans(subject, tokens, lengths)))


def assert_no_alarm(check: NumericCheck, *names: str) -> None:
    assert set(check.reports) >= set(names)
    for name, reports in check.reports.items():
        assert len(reports) == len(check.oracle.plans), name
        assert all(report.passed for report in reports), name


def test_right_passes_raise_no_alarm(smollm2_model: Model) -> None:
    check = checking(smollm2_model, 4, 1, 17)
    captured = Source(smollm2_model, instruments=(check,)).transform(SOURCE).capture().rewrite("last-token-logits")
    captured.rewrite("legalize-executorch")
    captured.rewrite("legalize-aten").rewrite(RIGHT)
    assert_no_alarm(check, *SOURCE.split(","), "legalize-executorch", *(one.name for one in RIGHT))


def test_right_passes_raise_no_alarm_on_the_quantized_model(smollm2_model: Model) -> None:
    check = checking(smollm2_model, 2, 9)
    quantized = Source(smollm2_model, instruments=(check,)).quantize("8da4w").transform(SOURCE)
    captured = quantized.capture().rewrite("last-token-logits")
    captured.rewrite("legalize-executorch")
    captured.rewrite("legalize-aten")
    assert_no_alarm(check, *SOURCE.split(","), "last-token-logits", "legalize-executorch", "legalize-aten")
