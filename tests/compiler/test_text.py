"""The text of a program: golden, equal for equal programs, and different where programs differ."""

from collections.abc import Callable

from tests.compiler import tiny
from triptych.compiler.program import Program
from triptych.compiler.text import program_text


def test_the_text_of_a_small_program_is_golden(golden: Callable[[str, str], None]) -> None:
    program = tiny.captured(tiny.tiny(layers=1)).rewrite("last-token-logits").program
    golden("tiny_program.txt", program_text(program))


def test_equal_models_have_equal_text_however_often_one_captured_before(tiny_program: Program) -> None:
    again = tiny.captured().rewrite("last-token-logits").program
    assert program_text(again) == program_text(tiny_program)


def test_a_model_with_another_layer_has_another_text(tiny_program: Program) -> None:
    assert program_text(tiny.captured(tiny.tiny(layers=1)).program) != program_text(tiny_program)


def test_the_tables_can_be_printed_without_the_graphs(tiny_program: Program) -> None:
    text = program_text(tiny_program, graphs=False)
    assert "aten." not in text
    assert "method decode (decode)" in text
