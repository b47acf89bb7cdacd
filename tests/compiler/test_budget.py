"""Budgets as text, on programs whose cost is known by hand, in pipelines, and blamed on a step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler.budget import METRICS, Budget, BudgetError, find_culprit
from triptych.compiler.capture import capture
from triptych.compiler.model import EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.pipeline import parse
from triptych.compiler.program import Program
from triptych.compiler.roles import OTHER
from triptych.compiler.stages import Captured
from triptych.errors import PipelineError, UsageError
from triptych.manifest import DynamicDim, TensorSignature
from triptych.passes.assert_cost import AssertCost

S = DynamicDim("S", 2, 250_000)


class Additions(nn.Module):
    """Adds 1 so many times: each time x is read and written."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.count):
            x = x + 1
        return x


class Product(nn.Module):
    """x xᵀ, which costs 2 S² FLOPs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1) @ x.unsqueeze(0)


def program_of(module: nn.Module, *names: str, size: int | DynamicDim = 250_000) -> Program:
    """Return a program with methods of these names (default "run") over x, float32 [size]: 1 MB by default."""
    x = TensorSignature("x", "float32", (size,))
    entries = tuple(
        EntryPoint(name, frozenset({OTHER}), lambda module, x: module(x), (x,), (OutputPort("y"),))
        for name in names or ("run",)
    )
    return capture(Model(module, entries, Metadata(max_context=1, model_max_context=1, vocab_size=2)))


@pytest.fixture(scope="module")
def two_megabytes() -> Program:
    return program_of(Additions(1))


@pytest.fixture(scope="module")
def six_megabytes() -> Program:
    return program_of(Additions(3))


# ---------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("decode.bytes<=60MB", Budget("decode", "bytes", "<=", 60_000_000)),
        ("prefill.flops<1.5G", Budget("prefill", "flops", "<", 1_500_000_000)),
        ("*.peak_live_bytes<=10MiB", Budget("*", "peak_live_bytes", "<=", 10 * 2**20)),
        ("decode.bytes_read<=1536KiB", Budget("decode", "bytes_read", "<=", 1536 * 1024)),
        ("a_1.bytes_written<0.5KB", Budget("a_1", "bytes_written", "<", 500)),
        ("decode.constant_bytes<=2G", Budget("decode", "constant_bytes", "<=", 2_000_000_000)),
        ("decode.constant_bytes<=2GiB", Budget("decode", "constant_bytes", "<=", 2 * 2**30)),
        ("prefill.flops@S=128<=1G", Budget("prefill", "flops", "<=", 10**9, (("S", 128),))),
        ("prefill.flops@S=128&T=3<=7K", Budget("prefill", "flops", "<=", 7000, (("S", 128), ("T", 3)))),
        (" decode.bytes <= 60 MB ", Budget("decode", "bytes", "<=", 60_000_000)),
        ("decode.bytes<=0", Budget("decode", "bytes", "<=", 0)),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        "decode.bytes<=60MB",
        "prefill.flops<1.5G",
        "*.peak_live_bytes<=10MiB",
        "decode.bytes<=1.5MiB",
        "decode.bytes<=1KiB",
        "decode.bytes<=1.234567MB",
        "decode.bytes<=512KiB",
        "decode.bytes<=100",
        "decode.bytes<=0",
        "prefill.flops@S=128&T=3<=7K",
    ],
)
def test_budgets_are_printed_with_the_fewest_digits(text: str) -> None:
    assert str(Budget.parse(text)) == text


NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
LIMITS = st.one_of(
    st.integers(0, 10**40),
    st.builds(lambda count, unit: count * unit, st.integers(0, 5000), st.sampled_from([1000, 10**8, 2**20, 2**29])),
)
BUDGETS = st.builds(
    Budget,
    st.one_of(st.just("*"), NAMES),
    st.sampled_from(METRICS),
    st.sampled_from(["<", "<="]),
    LIMITS,
    st.dictionaries(NAMES, st.integers(0, 9999), max_size=3).map(lambda sizes: tuple(sizes.items())),
)


@settings(deadline=None, derandomize=True)
@given(BUDGETS)
def test_every_budget_is_read_back_as_it_was_printed(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode<=3", "'decode<=3' is no budget; expected one such as decode.bytes<=60MB"),
        ("decode.bytes=3", "is no budget"),
        ("decode.bytes>=3", "is no budget"),
        ("decode.bytes<=", "is no budget"),
        ("decode.bytes@S<=3", "is no budget"),
        ("decode.speed<=3", "no budget for 'speed'; there is one for flops, bytes, bytes_read"),
        ("decode.flops<=3MB", "counts in 'MB'; flops is counted in G, M, K, or without a unit"),
        ("decode.bytes<=3TB", "counts in 'TB'; bytes is counted in G, M, K, GB, MB, KB, GiB, MiB, KiB, or without"),
        ("decode.bytes<=1.0005K", r"sets a limit of 1000\.5; expected a whole number"),
        ("decode.bytes@S=1&S=2<=4", "gives the size 'S' twice"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (("decode", "bytes", ">", 3), "cannot say '>'; it says <= or <"),
        (("decode", "bytes", "<", -3), "the budget of decode.bytes is -3; expected 0 or more"),
        (("a method", "bytes", "<", 3), "'a method.bytes' cannot have a budget"),
        (("decode", "bytes", "<", 3, (("S", -1),)), "'decode.bytes@S=-1' cannot have a budget"),
    ],
)
def test_no_budget_exists_that_no_text_can_say(budget: tuple[str, str, str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Budget(*budget)


# ---------------------------------------------------------------------------------------------------- overruns


@pytest.mark.parametrize(
    ("text", "overrun"),
    [
        ("run.bytes<=2MB", None),
        ("run.bytes<2MB", "run.bytes is 2 MB, budget less than 2 MB"),
        ("run.bytes<=1.9MB", "run.bytes is 2 MB, budget 1.9 MB"),
        ("run.bytes<=1999999", "run.bytes is 2 MB, budget 1.999999 MB"),
        ("run.bytes<=999", "run.bytes is 2 MB, budget 999"),
        ("run.bytes<=1.999MB", "run.bytes is 2 MB, budget 1.999 MB"),
        ("run.bytes<=1MiB", "run.bytes is 1.91 MiB, budget 1 MiB"),
        ("run.bytes_read<=512KiB", "run.bytes_read is 977 KiB, budget 512 KiB"),
        ("*.peak_live_bytes<=1MB", "run.peak_live_bytes is 2 MB, budget 1 MB"),
        ("run.flops<=0", None),
        ("run.flops<0", "run.flops is 0, budget less than 0"),
        ("run.constant_bytes<=0", None),
    ],
)
def test_an_overrun_names_the_value_and_the_limit(two_megabytes: Program, text: str, overrun: str | None) -> None:
    assert Budget.parse(text).overrun(two_megabytes) == overrun


def test_digits_are_added_where_rounding_would_hide_the_overrun() -> None:
    program = program_of(Additions(1), size=125_001)  # moves 1,000,008 bytes
    assert Budget.parse("run.bytes<=1MB").overrun(program) == "run.bytes is 1,000,008, budget 1,000,000"
    assert Budget.parse("run.bytes<=1000.004KB").overrun(program) == "run.bytes is 1,000,008, budget 1,000,004"


def test_a_budget_may_state_the_size() -> None:
    program = program_of(Product(), size=DynamicDim("S", 2, 1000))
    assert Budget.parse("run.flops<=2M").overrun(program) is None
    assert Budget.parse("run.flops@S=1000<2M").overrun(program) == "run.flops@S=1000 is 2 M, budget less than 2 M"
    assert Budget.parse("run.flops@S=100<=20K").overrun(program) is None
    assert Budget.parse("*.flops@S=100<20K").overrun(program) == "run.flops@S=100 is 20 K, budget less than 20 K"
    with pytest.raises(UsageError, match="S is 1001; run takes 2 to 1000"):
        Budget.parse("run.flops@S=1001<=1").overrun(program)
    with pytest.raises(UsageError, match="'T'; known: S"):
        Budget.parse("*.flops@T=1<=1").overrun(program)


def test_every_method_means_the_dearest(tiny_program: Program) -> None:
    overrun = Budget.parse("*.flops<=1").overrun(tiny_program)
    assert overrun is not None
    assert overrun.startswith("prefill.flops is ")


def test_a_budget_for_no_method_of_the_program_names_the_methods(tiny_program: Program) -> None:
    with pytest.raises(
        PipelineError, match=r"no method 'encode'; its methods: token_embedding, prefill, decode, and \*"
    ):
        Budget.parse("encode.bytes<=1").overrun(tiny_program)


# ---------------------------------------------------------------------------------------------------- culprits


def test_the_culprit_is_the_first_step_that_broke_what_held(two_megabytes: Program, six_megabytes: Program) -> None:
    budget = Budget.parse("run.bytes<=5MB")
    history = [
        ("capture", two_megabytes),
        ("last-token-logits", two_megabytes),
        ("swap-x{max=3}", six_megabytes),
        ("fold", two_megabytes),
        ("unfold", six_megabytes),
    ]
    assert find_culprit(budget, history) == "broken by swap-x{max=3}: 2 MB → 6 MB"
    assert find_culprit(budget, history[:2]) == "kept after every step"


def test_a_budget_may_be_broken_from_the_start(two_megabytes: Program, six_megabytes: Program) -> None:
    budget = Budget.parse("run.bytes<1MiB")
    history = [("capture", two_megabytes), ("swap-x", six_megabytes)]
    assert find_culprit(budget, history) == "broken from the start: 1.91 MiB (capture)"


def test_a_step_that_adds_the_method_is_a_culprit(two_megabytes: Program) -> None:
    other = program_of(Additions(1), "other")
    budget = Budget.parse("run.bytes<=1MB")
    assert find_culprit(budget, [("capture", other), ("split", two_megabytes)]) == (
        "broken by split, which added run: 2 MB"
    )


def test_close_values_are_told_apart() -> None:
    history = [(name, program_of(Additions(1), size=size)) for name, size in (("capture", 125_000), ("pad", 125_001))]
    assert find_culprit(Budget.parse("run.bytes<=1MB"), history) == "broken by pad: 1,000,000 → 1,000,008"


# ---------------------------------------------------------------------------------------------------- the pass


@pytest.fixture(scope="module")
def captured() -> Captured:
    return tiny.captured(tiny.tiny(layers=1))


def test_within_budget_the_pass_changes_nothing(captured: Captured) -> None:
    rewritten = captured.rewrite("assert-cost{decode.bytes<=1MB,*.flops<1G}")
    assert rewritten.program is captured.program
    assert str(rewritten.pipeline).endswith("assert-cost{decode.bytes<=1MB,*.flops<1G}")


def test_the_first_overrun_fails_the_pipeline(captured: Captured) -> None:
    with pytest.raises(
        BudgetError, match=r"^decode\.bytes is \d+(\.\d+)? KB, budget 1 KB; broken from the start"
    ) as caught:
        captured.rewrite("assert-cost{prefill.bytes<=1MB,decode.bytes<=1KB,prefill.flops<=1}")
    assert caught.value.budget == Budget("decode", "bytes", "<=", 1000)
    assert isinstance(caught.value, PipelineError)


def test_the_step_that_broke_the_budget_is_named(captured: Captured) -> None:
    within = Budget.parse("decode.bytes_written<1").value(captured.program)
    with pytest.raises(BudgetError, match=r"; broken by expand-tanh-gelu: .* KB → .* KB$"):
        captured.rewrite(f"last-token-logits,expand-tanh-gelu,assert-cost{{decode.bytes_written<={within}}}")


def test_the_pass_sees_what_stands_before_it(captured: Captured) -> None:
    flops = Budget.parse("prefill.flops@S=24<1").value(captured.program)
    assert flops is not None
    budget = f"prefill.flops@S=24<{flops}"
    with pytest.raises(BudgetError):
        captured.rewrite(f"assert-cost{{{budget}}},last-token-logits")
    captured.rewrite(f"last-token-logits,assert-cost{{{budget}}}")


def test_an_unknown_method_is_an_error_of_the_pipeline(captured: Captured) -> None:
    with pytest.raises(PipelineError, match="no method 'encode'; its methods: token_embedding, prefill, decode"):
        captured.rewrite("assert-cost{encode.bytes<=1KB}")


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("assert-cost", 1, "needs the option budgets: assert-cost{…}"),
        ("assert-cost{}", 1, "needs the option budgets"),
        ("assert-cost{decode.bytes<=1KB, decode.speed<3}", 32, "no budget for 'speed'"),
        ("assert-cost{decode.bytes<=1KB,}", 31, "found ''"),
        ("assert-cost{budgets=3}", 13, "the budgets of assert-cost are written without 'budgets='"),
        ("assert-cost{max=3}", 13, "has no option 'max'"),
    ],
)
def test_what_is_wrong_in_the_text_is_named_with_its_column(text: str, column: int, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse(text)
    assert f"column {column}:" in str(caught.value)
    assert message in str(caught.value)


def test_the_text_gives_budgets() -> None:
    (one,) = parse("assert-cost{ decode.bytes <= 60MB , prefill.flops@S=8<=2G }").program
    assert one == AssertCost(
        (Budget("decode", "bytes", "<=", 60_000_000), Budget("prefill", "flops", "<=", 2 * 10**9, (("S", 8),)))
    )
