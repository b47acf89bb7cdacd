"""What a pattern may hold, and what its wildcards and literals take."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler.rules import (
    applied,
    of_function,
    sin_of_cos,
)
from triptych.compiler.manager import run_program
from triptych.compiler.pattern import equal, fits
from triptych.compiler.rewrite_rule import RewriteRule
from triptych.errors import VerificationError

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("wanted", "found", "same"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0.0, False, False),
        (True, True, True),
        (float("nan"), float("nan"), True),
        ([0, 2, 1], (0, 2, 1), True),
        ([0, 2, 1], [0, 2], False),
        ("tanh", "none", False),
        (None, None, True),
        (None, 0, False),
        (torch.float32, torch.float32, True),
    ],
)
def test_literals_are_compared_by_value(wanted: object, found: object, same: bool) -> None:
    assert equal(wanted, found) is same
    assert equal(found, wanted) is same


@pytest.mark.parametrize(
    ("kind", "value", "taken"),
    [
        (float, 1, True),
        (int, 1.0, False),
        (int, True, False),
        (float, True, False),
        (bool, 1, False),
        (bool, True, True),
        (int | None, None, True),
        (Tensor | None, None, True),
        (Tensor, None, False),
        (list[int], [1, 2], True),
        (list[int], [1, 2.5], False),
        (tuple[int, ...], [1], True),
        (list, 3, False),
        (str, "tanh", True),
        (torch.dtype, torch.float32, True),
        (Any, "anything", True),
    ],
)
def test_wildcards_take_their_kind(kind: Any, value: object, taken: bool) -> None:
    assert fits(kind, value) is taken


def _wrong(pattern: Callable[..., Any], replacement: Callable[..., Any] | None = None) -> RewriteRule:
    namespace = {"name": "wrong", "pattern": pattern, "replacement": replacement or pattern}
    return type("Wrong", (RewriteRule,), namespace)()  # type: ignore[no-any-return]


class Wrong:
    """Patterns that no rule can have."""

    def unused(self, x: Tensor, y: Tensor) -> Any:
        return aten.relu.default(x)

    def loose_call(self, x: Tensor) -> Any:
        aten.sin.default(x)
        return aten.relu.default(x)

    def variadic_alone(self, *rest: Tensor) -> Any:
        return aten.relu.default(rest[0])

    def strange_kind(self, x: Sequence[Tensor]) -> Any:
        return aten.cat.default(x)

    def unknown_kind(self, x: "Nonsense") -> Any:  # type: ignore[name-defined]  # noqa: F821
        return aten.relu.default(x)

    def keywords(self, **x: Tensor) -> Any:
        return aten.relu.default(x["x"])

    def branches(self, x: Tensor) -> Any:
        return aten.relu.default(x) if x else x


WRONG_PATTERNS: list[tuple[Callable[..., Any], str]] = [
    (lambda self, x, y: x + y, r"calls add, which is no operator of a captured graph; write torch\.ops\.aten\.add"),
    (lambda self, x: torch.relu(x), r"calls relu, which is no operator .*; write torch\.ops\.aten\.relu"),
    (lambda self, x: x.relu(), r"calls relu, which is no operator"),
    (lambda self, x: aten.mul.Tensor(x, torch.ones(2)), r"calls ones, which is no operator"),
    (
        lambda self, x: aten.relu.default(x)[0],
        r"indexes relu_default, which is no list; write torch\.ops\.aten\.select",
    ),
    (lambda self, x: aten.view.default(x, [x.shape[0]]), r"calls getattr, which is no operator"),
    (lambda self, x: x, r"the pattern returns its parameter x; return what an operator gave"),
    (lambda self, x: None, r"the pattern returns None; return what an operator gave"),
    (
        lambda self, x: aten.linear.default(x),
        r"aten\.linear\.default needs weight, and linear_default does not give it",
    ),
    (lambda self, x: aten.relu.default(x, slope=2), r"aten\.relu\.default takes no slope, which relu_default gives"),
    (Wrong.unused, r"does not use its parameter y, so nothing can be bound to it"),
    (Wrong.loose_call, r"calls aten\.sin\.default and returns nothing of it; return its result too"),
    (Wrong.variadic_alone, r"uses \*rest as one value; use it in a list: \[first, \*rest\]"),
    (Wrong.strange_kind, r"parameter x of the pattern is annotated .*Sequence.*; annotate Tensor, int, float"),
    (Wrong.unknown_kind, r"an annotation of the pattern means nothing here \(name 'Nonsense' is not defined\)"),
    (Wrong.keywords, r"the pattern takes \*\*x; name each wildcard"),
    (Wrong.branches, r"the pattern cannot be traced: .*control flow"),
]


@pytest.mark.parametrize(("pattern", "message"), WRONG_PATTERNS)
def test_a_wrong_pattern_is_an_error_that_names_the_rule(pattern: Callable[..., Any], message: str) -> None:
    program = of_function(sin_of_cos, (3,))
    with pytest.raises(VerificationError, match=f"rule wrong: .*{message}"):
        run_program(program, [_wrong(pattern)])


def test_pattern_and_replacement_have_the_same_parameters() -> None:
    rule = _wrong(lambda self, x, y: aten.add.Tensor(x, y), lambda self, y, x: x)
    with pytest.raises(VerificationError, match=r"its replacement takes \(y, x\), its pattern \(x, y\); give both the"):
        run_program(of_function(sin_of_cos, (3,)), [rule])


def test_operators_without_operands_can_stand_in_a_pattern() -> None:
    rule = _wrong(
        lambda self, n: aten.arange.default(n, device=torch.device("cpu")),
        lambda self, n: torch.ones(n).cumsum(0).long() - 1,
    )
    program = of_function(lambda module, x: torch.arange(5) + x, (5,), dtype="int64")
    assert len(applied(program, rule, torch.arange(5))[1].matches) == 1
