"""Rules, and methods for them to work on: a function of (module, inputs…) is captured as the method "main"."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triptych.compiler.capture import capture
from triptych.compiler.editing import GraphEditor
from triptych.compiler.manager import PassResult, run_program
from triptych.compiler.model import EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Program
from triptych.compiler.rewrite_rule import RewriteRule, RuleMatch
from triptych.compiler.roles import OTHER
from triptych.errors import PipelineError
from triptych.manifest import DynamicDim, TensorSignature

aten = torch.ops.aten
S = DynamicDim("S", 2, 16)


class FromFunction(nn.Module):
    """A function as a module, with two buffers to write into."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(1, 8, 2, 4))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


def captured(module: nn.Module, *shapes: tuple[Any, ...], outputs: int = 1, dtype: str = "float32") -> Program:
    """Capture `module` with inputs x, y, z … of these shapes."""
    ports = tuple(TensorSignature(name, dtype, shape) for name, shape in zip("xyzuvw", shapes, strict=False))
    entry = EntryPoint(
        "main",
        frozenset({OTHER}),
        lambda module, *inputs: module(*inputs),
        ports,
        tuple(OutputPort(f"out{index}") for index in range(outputs)),
    )
    return capture(Model(module, (entry,), Metadata(max_context=1, model_max_context=1, vocab_size=1)))


def of_function(function: Callable[..., Any], *shapes: tuple[Any, ...], **options: Any) -> Program:
    """Capture a function of (module, inputs…)."""
    return captured(FromFunction(function).eval(), *shapes, **options)


def targets(program: Program, method: str = "main") -> list[str]:
    """The operators of a method, in order."""
    return [str(node.target) for node in program.methods[method].exported.graph.nodes if node.op == "call_function"]


def applied(program: Program, rule: GraphPass, *inputs: Tensor, method: str = "main") -> tuple[Program, PassResult]:
    """Apply `rule`; the rewritten method gives what the captured one gave, on `inputs`, buffers included."""
    rewritten, (result,) = run_program(program, [rule])
    # Deep copies: programs share their buffers, and each of the two must write into its own.
    wanted_module, got_module = (copy.deepcopy(one.methods[method].exported.module()) for one in (program, rewritten))
    for _ in range(2):
        torch.testing.assert_close(
            got_module(*(one.clone() for one in inputs)), wanted_module(*(one.clone() for one in inputs))
        )
        torch.testing.assert_close(dict(got_module.named_buffers()), dict(wanted_module.named_buffers()))
    return rewritten, result


def reasons(program: Program, rule: RewriteRule) -> list[str]:
    """Why `rule` leaves every candidate alone."""
    with pytest.raises(PipelineError, match=f"{rule.name} matched nothing"):
        run_program(program, [rule])
    method = program.methods["main"]
    log = MatchLog("main")
    rule.rewrite(GraphEditor(method.exported), method, log)
    assert log.matches == []
    return [one.reason for one in log.refusals]


# ---------------------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class DropAddZero(RewriteRule):
    """Replace x + 0 by x."""

    name: ClassVar[str] = "drop-add-zero"

    def pattern(self, x: Tensor, zero: float) -> Tensor:
        return aten.add.Tensor(x, zero)

    def check(self, match: RuleMatch) -> str | None:
        return None if match["zero"] == 0 else f"adds {match['zero']}, not 0"

    def replacement(self, x: Tensor, zero: float) -> Tensor:
        return x


@dataclass(frozen=True)
class GatedSilu(RewriteRule):
    """silu(gate) * up, spelled as x sigmoid(x) * up."""

    name: ClassVar[str] = "gated-silu"

    def pattern(self, gate: Tensor, up: Tensor) -> Tensor:
        return aten.mul.Tensor(aten.silu.default(gate), up)

    def replacement(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(gate) * up


@dataclass(frozen=True)
class DoubleRelu(RewriteRule):
    """relu(relu(x)) is relu(x)."""

    name: ClassVar[str] = "double-relu"

    def pattern(self, x: Tensor) -> Tensor:
        return aten.relu.default(aten.relu.default(x))

    def replacement(self, x: Tensor) -> Tensor:
        return torch.relu(x)


@dataclass(frozen=True)
class SharedDoubleRelu(DoubleRelu):
    name: ClassVar[str] = "shared-double-relu"
    interior_may_be_shared: ClassVar[bool] = True


@dataclass(frozen=True)
class FuseLinears(RewriteRule):
    """Two projections of one value become one, whose result is split."""

    name: ClassVar[str] = "fuse-linears"

    def pattern(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return aten.linear.default(x, first), aten.linear.default(x, second)

    def replacement(self, x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, torch.cat([first, second])).split([first.shape[0], second.shape[0]], -1)


@dataclass(frozen=True)
class Spelled(RewriteRule):
    """sin(cos(x)) becomes whatever `how` says; how wrong it is is the test's matter."""

    name: ClassVar[str] = "spelled"
    how: str = ""

    def pattern(self, x: Tensor) -> Tensor:
        return aten.sin.default(aten.cos.default(x))

    def replacement(self, x: Tensor) -> Any:
        return REPLACEMENTS[self.how](x)


def _by_length(x: Tensor) -> Tensor:
    return x if x.shape[0] > 4 else torch.sin(x)


def _fails(x: Tensor) -> Tensor:
    raise ZeroDivisionError(f"no luck with rank {x.dim()}")


REPLACEMENTS: dict[str, Callable[[Tensor], Any]] = {
    "same": lambda x: torch.sin(torch.cos(x)),
    "half": lambda x: torch.sin(torch.cos(x)).half(),
    "row": lambda x: torch.sin(torch.cos(x[:1])),
    "pair": lambda x: (x, x),
    "number": lambda x: 3.0,
    "nothing": lambda x: None,
    "constant": lambda x: x * torch.tensor(0.5),
    "length": _by_length,
    "fails": _fails,
    "transposed": lambda x: torch.sin(torch.cos(x.t().contiguous().t())),
}


@dataclass(frozen=True)
class PlainAdd(RewriteRule):
    """Addition with every argument spelled out."""

    name: ClassVar[str] = "plain-add"

    def pattern(self, x: Tensor, y: Tensor) -> Tensor:
        return aten.add.Tensor(x, other=y, alpha=1)

    def replacement(self, x: Tensor, y: Tensor) -> Tensor:
        return x - torch.neg(y)


class FeedForward(nn.Module):
    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 6, bias=bias)
        self.up = nn.Linear(4, 5, bias=bias)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(F.silu(self.gate(x))), self.up(x)


def sin_of_cos(_: nn.Module, x: Tensor) -> Tensor:
    return torch.sin(torch.cos(x))
