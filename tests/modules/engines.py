"""One sequence of calls on every engine: a module's eager form, its export, ExecuTorch and AOTInductor must agree.

A test of an exportable module is then a few lines::

    run_everywhere(module, [(x, torch.tensor([0])), (y, torch.tensor([7]))])

Inputs whose sizes differ between the calls are exported with dynamic dimensions. State flows from call to call in
every engine. Compiling for AOTInductor takes half a minute whatever is compiled, so `together` puts several modules
into one.
"""

from __future__ import annotations

import inspect
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from triptych.compiler.model import EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.program_runner import ProgramRunner
from triptych.compiler.roles import OTHER
from triptych.compiler.stages import Captured, Source
from triptych.compiler.trace import Runs
from triptych.errors import TriptychError
from triptych.manifest import DynamicDim, Manifest, TensorSignature
from triptych.runtime.loaders import load_runner

ENGINES: Final = ("export", "executorch", "aotinductor")
CHEAP: Final = ("export", "executorch")
METHOD: Final = "call"
CONTEXT: Final = 4096

Calls = Sequence[tuple[Tensor, ...]]


def run_everywhere(
    module: nn.Module,
    calls: Calls,
    *,
    engines: Sequence[str] = ENGINES,
    target: str = "xnnpack",
    rtol: float = 1e-4,
    atol: float = 1e-5,
    names: Sequence[str] = (),
) -> list[tuple[Tensor, ...]]:
    """Play `calls`, each the positional inputs of one call, on the eager module and on `engines`; assert equality.

    Every engine begins from the module's own state. Outputs of every call are compared, and the state after the
    last one where an engine shows it. An input called ``start_pos`` is announced to the caches below, as it is in
    entry points. `names` names the inputs where the forward takes ``*inputs``. `target` is the ExecuTorch target.
    Returns the outputs of the eager module; the module itself keeps its state.
    """
    captured = captured_calls(module, calls, names)
    wanted, state = _play_eagerly(module, calls, captured)
    for engine in engines:
        got, rows = _PLAYERS[engine](captured, calls, target)
        for index, (one, other) in enumerate(zip(wanted, got, strict=True)):
            for position, (expected, actual) in enumerate(zip(one, other, strict=True)):
                _assert_close(f"{engine}, call {index}, output {position}", actual, expected, rtol, atol)
        for name, row in rows.items():
            _assert_close(f"{engine}, state {name} at the end", row, state[name], rtol, atol)
    return wanted


def together(*cases: tuple[nn.Module, Calls]) -> tuple[nn.Module, Calls]:
    """Join modules and their calls into one module that makes a call of each; all need the same number of calls."""
    assert len({len(calls) for _, calls in cases}) == 1, "cases that run together have the same number of calls"
    joined = [tuple(value for one in step for value in one) for step in zip(*(c for _, c in cases), strict=True)]
    return _Together([module for module, _ in cases], [len(calls[0]) for _, calls in cases]), joined


class _Together(nn.Module):
    """Hands each module its share of the inputs; each is told its own position."""

    def __init__(self, modules: Sequence[nn.Module], counts: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.counts = tuple(counts)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from triptych.modules.position import sequence_position

        found: list[Tensor] = []
        rest = list(inputs)
        for part, count in zip(self.parts, self.counts, strict=True):
            own, rest = rest[:count], rest[count:]
            position = dict(zip(_input_names(part, count), own, strict=True)).get("start_pos")
            with sequence_position(position):
                found += _as_tuple(part(*own))
        return tuple(found)


# ---------------------------------------------------------------------------------------------------- capture


def captured_calls(module: nn.Module, calls: Calls, names: Sequence[str] = ()) -> Captured:
    """Export `module` as one method, `METHOD`; sizes that differ between the calls are dynamic, from 1 up."""
    named = tuple(names) or _input_names(module, len(calls[0]))
    ports = tuple(_ports(named, calls))
    largest = {
        name: max((call[index] for call in calls), key=lambda one: one.numel()) for index, name in enumerate(named)
    }
    copied = _copy(module)
    with torch.no_grad(), _announced(largest):
        count = len(_as_tuple(copied(*largest.values())))
    entry = EntryPoint(
        METHOD,
        frozenset({OTHER}),
        lambda owner, *inputs: owner(*inputs),
        ports,
        tuple(OutputPort(f"out_{index}") for index in range(count)),
        largest,
    )
    return Source(Model(module, (entry,), Metadata(CONTEXT, CONTEXT, 1))).capture()


def _input_names(module: nn.Module, count: int) -> tuple[str, ...]:
    parameters = list(inspect.signature(module.forward).parameters.values())
    if any(one.kind is inspect.Parameter.VAR_POSITIONAL for one in parameters):
        return tuple(f"input_{index}" for index in range(count))
    return tuple(one.name for one in parameters[:count])


def _ports(names: Sequence[str], calls: Calls) -> Iterator[TensorSignature]:
    """Axes whose sizes change in step share one dynamic dimension."""
    dims: dict[tuple[int, ...], DynamicDim] = {}
    for index, name in enumerate(names):
        values = [call[index] for call in calls]
        shape: list[int | DynamicDim] = []
        for axis in range(values[0].dim()):
            sizes = tuple(value.shape[axis] for value in values)
            if len(set(sizes)) == 1:
                shape.append(sizes[0])
            else:
                shape.append(dims.setdefault(sizes, DynamicDim(f"S{len(dims)}", 1, max(sizes))))
        yield TensorSignature(name, str(values[0].dtype).removeprefix("torch."), tuple(shape))


# ---------------------------------------------------------------------------------------------------- engines

Played = tuple[list[tuple[Tensor, ...]], dict[str, Tensor]]


def _play_eagerly(module: nn.Module, calls: Calls, captured: Captured) -> Played:
    copied = _copy(module).eval()
    (method,) = captured.program.methods.values()
    outputs = []
    for call in calls:
        with torch.no_grad(), _announced(dict(zip([port.name for port in method.inputs], call, strict=True))):
            outputs.append(tuple(one.clone() for one in _as_tuple(copied(*call))))
    return outputs, {name: value.clone() for name, value in copied.named_buffers()}


def _play_export(captured: Captured, calls: Calls, _target: str) -> Played:
    return _play(ProgramRunner(captured.program), captured, calls)


def _play_executorch(captured: Captured, calls: Calls, target: str) -> Played:
    with tempfile.TemporaryDirectory() as folder:
        artifact = captured.lower(target).save(Path(folder) / "artifact")
        return _play_artifact(artifact.path, artifact.manifest, captured, calls)


def _play_artifact(path: Path, manifest: Manifest, captured: Captured, calls: Calls) -> Played:
    runner = load_runner(path, manifest)
    try:
        return _play(runner, captured, calls)
    finally:
        runner.close()


def _play(runner: Runs, captured: Captured, calls: Calls) -> Played:
    names = [port.name for port in captured.program.methods[METHOD].inputs]
    outputs = []
    for call in calls:
        results = runner.run(METHOD, **dict(zip(names, call, strict=True)))
        outputs.append(tuple(one.clone() for one in results.values()))
    return outputs, {name: row.clone() for name, row in runner.state.items()}


def _play_aotinductor(captured: Captured, calls: Calls, _target: str) -> Played:
    """A package owns its state; it is loaded once and called in order, and shows its outputs only."""
    from torch._inductor import aoti_compile_and_package, aoti_load_package

    if shutil.which("g++") is None:
        raise TriptychError("AOTInductor needs g++ on the path")
    legalized = captured.rewrite("legalize-aten").program.methods[METHOD].exported
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        package = aoti_compile_and_package(legalized, package_path=str(Path(folder) / "package.pt2"))
        loaded: Any = aoti_load_package(package)
        return [tuple(one.clone() for one in _as_tuple(loaded(*call))) for call in calls], {}


_PLAYERS: Final = {"export": _play_export, "executorch": _play_executorch, "aotinductor": _play_aotinductor}


def _copy(module: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(module)


def _announced(inputs: dict[str, Tensor]) -> Any:
    from triptych.modules.position import sequence_position

    return sequence_position(inputs.get("start_pos"))


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, (tuple, list)) else (outputs,)


def _assert_close(where: str, got: Tensor, wanted: Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol, msg=lambda text: f"{where}: {text}")
