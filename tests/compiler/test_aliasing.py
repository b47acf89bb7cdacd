"""No rewrite changes what an in-place write is seen to do."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.compiler.rules import DropAddZero, PlainAdd, Spelled, applied, of_function, reasons, targets
from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import MatchLog
from triptych.compiler.rewrite_rule import RewriteRule, RuleMatch

aten = torch.ops.aten


def _cos_write_sin(write: Callable[[Any, Tensor], Any]) -> Callable[..., Tensor]:
    def function(module: Any, x: Tensor) -> Tensor:
        inner = torch.cos(module.total)
        write(module, x)
        return torch.sin(inner) + module.cache.sum()

    return function


SPELLED_OUT = Spelled(how="same")


@pytest.mark.parametrize(
    "write",
    [
        lambda module, x: module.total.add_(x),
        lambda module, x: module.total.view(2, 2).mul_(2),
        lambda module, x: module.total.reshape(2, 2)[0].zero_(),
        lambda module, x: F.dropout(module.total, training=False).add_(x),
    ],
    ids=["buffer", "view", "composite view", "an operator that returns its input"],
)
def test_a_match_across_a_write_into_its_input_is_refused(write: Callable[[Any, Tensor], Any]) -> None:
    program = of_function(_cos_write_sin(write), (4,))
    (reason,) = reasons(program, SPELLED_OUT)
    assert reason.startswith("between its nodes aten.")
    assert reason.endswith("writes in place what the match reads")


@pytest.mark.parametrize(
    "write",
    [
        lambda module, x: module.cache.add_(1),
        lambda module, x: module.total.clone().add_(1),
        lambda module, x: (module.total + x).mul_(2),
        lambda module, x: F.linear(x, module.total.expand(4, 4)).relu_(),
    ],
    ids=["another buffer", "a copy", "a new value", "a composite operator's new value"],
)
def test_a_write_elsewhere_is_no_obstacle(write: Callable[[Any, Tensor], Any]) -> None:
    program = of_function(_cos_write_sin(write), (4,))
    assert len(applied(program, SPELLED_OUT, torch.randn(4))[1].matches) == 1


def test_a_match_across_a_cache_update_is_refused() -> None:
    def function(module: Any, x: Tensor) -> Tensor:
        inner = torch.cos(module.cache)
        torch.ops.triptych.update_cache(module.cache, x, torch.zeros(1, dtype=torch.int64))
        return torch.sin(inner)

    (reason,) = reasons(of_function(function, (1, 3, 2, 4)), SPELLED_OUT)
    assert "between its nodes triptych.update_cache.default (%update_cache" in reason


def test_a_result_must_not_become_an_alias_of_what_is_written_later() -> None:
    def function(module: Any, x: Tensor) -> Tensor:
        before = module.total + 0
        module.total.add_(x)
        return before * 2

    (reason, *_) = reasons(of_function(function, (4,)), DropAddZero())
    assert reason.startswith("its result would share other memory than now, and aten.add_.Tensor (%add_")


def test_a_result_that_is_written_later_must_not_become_an_alias() -> None:
    def function(_: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + 0
        y.mul_(2)
        return y, x * 3

    assert "aten.mul_.Tensor (%mul_" in reasons(of_function(function, (4,), outputs=2), DropAddZero())[0]


def test_a_view_that_is_written_through_must_stay_a_view() -> None:
    @dataclass(frozen=True)
    class CopyView(RewriteRule):
        name: ClassVar[str] = "copy-view"

        def pattern(self, x: Tensor) -> Tensor:
            return aten.t.default(x)

        def replacement(self, x: Tensor) -> Tensor:
            return x.t().clone()

    def function(module: Any, x: Tensor) -> Tensor:
        module.total.view(2, 2).t().add_(x)
        return module.total * 2

    assert "its result would share other memory than now" in reasons(of_function(function, (2, 2)), CopyView())[0]
    reads = of_function(lambda module, x: module.total.view(2, 2).t() + x, (2, 2))
    assert len(applied(reads, CopyView(), torch.randn(2, 2))[1].matches) == 1


@dataclass(frozen=True)
class OutOfPlace(RewriteRule):
    """x.add_(y) becomes x + y, right where nobody else sees x."""

    name: ClassVar[str] = "out-of-place"

    def pattern(self, x: Tensor, y: Tensor) -> Tensor:
        return aten.add_.Tensor(x, y)

    def replacement(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_write_is_dropped_only_where_nobody_sees_it() -> None:
    program = of_function(lambda module, x, y: (x * 2).add_(y), (3,), (3,))
    rewritten, _ = applied(program, OutOfPlace(), torch.randn(3), torch.randn(3))
    assert targets(rewritten) == ["aten.mul.Tensor", "aten.add.Tensor"]

    def seen(_: Any, x: Tensor, y: Tensor) -> Tensor:
        double = x * 2
        view = double.view(-1)
        return double.add_(y) - view

    (reason,) = reasons(of_function(seen, (3,), (3,)), OutOfPlace())
    assert reason.startswith("the match writes in place what aten.sub.Tensor (%sub")
    state = of_function(lambda module, x: module.total.add_(x) * 2, (4,))
    assert reasons(state, OutOfPlace()) == [
        "the match writes in place what the next call sees, and the replacement does not"
    ]
    argument = of_function(lambda module, x, y: x.add_(y) * 2, (4,), (4,))
    assert "what the caller sees" in reasons(argument, OutOfPlace())[0]


def test_a_replacement_must_not_write_what_the_match_does_not() -> None:
    @dataclass(frozen=True)
    class InPlace(PlainAdd):
        name: ClassVar[str] = "in-place"

        def replacement(self, x: Tensor, y: Tensor) -> Tensor:
            return x.add_(y)

    program = of_function(lambda module, x, y: x + y, (3,), (3,))
    assert reasons(program, InPlace()) == [
        "the replacement writes in place what the caller sees, and the match does not"
    ]


@dataclass(frozen=True)
class TwoWrites(RewriteRule):
    """An addition and then a multiplication in place, carried out in this order."""

    name: ClassVar[str] = "two-writes"

    def pattern(self, x: Tensor, y: Tensor, z: Tensor, factor: float) -> Any:
        return aten.add_.Tensor(x, y), aten.mul_.Tensor(z, factor)

    def replacement(self, x: Tensor, y: Tensor, z: Tensor, factor: float) -> Any:
        return x.sub_(-y), z.mul_(factor)


@pytest.mark.parametrize("add_first", [True, False])
def test_writes_into_one_memory_keep_their_order(add_first: bool) -> None:
    def function(module: Any, x: Tensor) -> Tensor:
        view = module.total.view(2, 2)
        if add_first:
            module.total.add_(x)
        view.mul_(3)
        if not add_first:
            module.total.add_(x)
        return module.total * 2

    program = of_function(function, (4,))
    if add_first:
        assert len(applied(program, TwoWrites(), torch.randn(4))[1].matches) == 1
    else:
        (reason,) = reasons(program, TwoWrites())
        assert "precedes aten.add_.Tensor (%add_" in reason
        assert "not so in the pattern, and one writes what the other uses" in reason


def test_a_read_between_two_writes_keeps_them_apart() -> None:
    def function(module: Any, x: Tensor) -> Tensor:
        view = module.total.view(4)
        seen = module.total.add_(x) * 2
        view.mul_(3)
        return seen

    (reason,) = reasons(of_function(function, (4,)), TwoWrites())
    assert reason.startswith("between its nodes aten.mul.Tensor (%mul, ")
    assert reason.endswith("uses what the match writes in place")


def test_a_write_within_the_match_is_not_carried_out_twice() -> None:
    @dataclass(frozen=True)
    class SineOfSum(RewriteRule):
        name: ClassVar[str] = "sine-of-sum"
        interior_may_be_shared: ClassVar[bool] = True

        def pattern(self, x: Tensor, y: Tensor) -> Tensor:
            return aten.sin.default(aten.add_.Tensor(x, y))

        def replacement(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.sin(x.add_(y)) * 1

    def function(module: Any, x: Tensor) -> Tensor:
        total = module.total.add_(x)
        return torch.sin(total) + total

    (reason,) = reasons(of_function(function, (4,)), SineOfSum())
    assert reason.startswith("aten.add_.Tensor (%add_, ")
    assert reason.endswith("within the match, writes in place and has other users")
    alone = of_function(lambda module, x: torch.sin(module.total.add_(x)), (4,))
    assert len(applied(alone, SineOfSum(), torch.randn(4))[1].matches) == 1


def test_a_shared_value_within_the_match_keeps_seeing_writes_through_its_result() -> None:
    @dataclass(frozen=True)
    class FlatRelu(RewriteRule):
        name: ClassVar[str] = "flat-relu"
        interior_may_be_shared: ClassVar[bool] = True

        def pattern(self, x: Tensor) -> Tensor:
            return aten.view.default(aten.relu.default(x), [-1])

        def replacement(self, x: Tensor) -> Tensor:
            return torch.relu(x.view(-1))

    def function(_: Any, x: Tensor) -> Tensor:
        inner = torch.relu(x)
        inner.view(-1).mul_(2)
        return inner * 1

    assert "its result would share other memory than now" in reasons(of_function(function, (2, 2)), FlatRelu())[0]
    reads = of_function(lambda module, x: (inner := torch.relu(x)).view(-1) * inner.sum(), (2, 2))
    assert len(applied(reads, FlatRelu(), torch.randn(2, 2))[1].matches) == 1


# ---------------------------------------------------------------------------------------------------- at random

_STEPS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + 0,
    lambda a, b: a + b.tanh(),
    lambda a, b: a.add_(b.tanh()),
    lambda a, b: a.mul_(b.tanh()),
    lambda a, b: a.view(2, 2).t().reshape(-1),
    lambda a, b: a.view(2, 2)[0].mul_(0.5).repeat(2),
    lambda a, b: a.view(-1),
    lambda a, b: a.clone(),
    lambda a, b: torch.sin(torch.cos(a)),
    lambda a, b: F.dropout(a, training=False),
]


@dataclass(frozen=True)
class DropClone(DropAddZero):
    name: ClassVar[str] = "drop-clone"

    def pattern(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return aten.clone.default(x)

    def check(self, match: RuleMatch) -> str | None:
        return None

    def replacement(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x


@dataclass(frozen=True)
class CopyFlat(DropClone):
    name: ClassVar[str] = "copy-flat"

    def pattern(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return aten.view.default(x, [-1])

    def replacement(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.reshape(-1).clone()


@pytest.mark.parametrize("seed", range(12))
def test_random_methods_full_of_writes_compute_the_same_after_every_rule(seed: int) -> None:
    random_ = random.Random(seed)
    steps = [(random_.choice(_STEPS), random_.random(), random_.random()) for _ in range(8)]

    def function(module: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        values = [x * 1.0, y * 1.0, module.total, x]
        for step, first, second in steps:
            values.append(step(values[int(first * len(values))], values[int(second * len(values))]))
        return values[-1] * 1.0, values[-2] * 1.0, module.total * 1.0

    program = of_function(function, (4,), (4,), outputs=3)
    for rule in (DropAddZero(), DropClone(), CopyFlat(), OutOfPlace(), SPELLED_OUT, TwoWrites()):
        wanted = copy.deepcopy(program.methods["main"].exported.module())
        method = program.methods["main"]
        editor = GraphEditor(method.exported, rule.name)
        rule.rewrite(editor, method, MatchLog("main"))
        got = copy.deepcopy(editor.finish().module())
        for _ in range(2):
            inputs = [torch.randn(4), torch.randn(4)]
            copies = [one.clone() for one in inputs]
            torch.testing.assert_close(got(*copies), wanted(*inputs))
            torch.testing.assert_close(copies, inputs)
            torch.testing.assert_close(dict(got.named_buffers()), dict(wanted.named_buffers()))
