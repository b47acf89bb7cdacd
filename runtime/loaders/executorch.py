# ruff: noqa: SLF001 (the binding marks its whole interface as private)
"""ExecuTorch programs (``.pte``) through the Python binding of its C++ runtime.

The binding's native module is imported directly: ``executorch.runtime`` pulls in the whole exporter, which costs
4 seconds and prints warnings. All names used here are the binding's own
(``executorch/extension/pybindings/pybindings.pyi``).

The state of a program lives in arenas that all of its methods share. A buffer's initial value is copied in
when a method is loaded, so all methods load before the first runs; `get_attribute` then gives tensors that
alias the arenas.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final
from weakref import WeakSet

import torch
from torch import Tensor

from triptych.errors import ArtifactError, RunError, UsageError
from triptych.manifest import Manifest, ProgramFile, StateRow
from triptych.runtime.loaders import missing_engine
from triptych.runtime.method_runner import Capabilities, MethodRunner, owned_rows
from triptych.runtime.native_log import caught_stderr
from triptych.runtime.state import check_rows
from triptych.runtime.threads import serial_openmp

# File identifier of the flatbuffer schema, and the extended header behind it: magic, its length, the sizes of the
# flatbuffer and, in newer files, of the segments (executorch/exir/_serialize/_program.py).
_IDENTIFIER: Final = b"ET12"
_HEADER: Final = struct.Struct("<4x4s4sIQQQ")
_HEADER_MAGIC: Final = b"eh00"

# cpuinfo tells about device files that only some phones have; the pool tells about its own size.
_NOISE: Final = ("[cpuinfo_utils.cpp:", "[threadpool.cpp:")

# What the runtime says of a delegate that it was not built with (executorch/runtime/executor/method.cpp).
_MISSING_BACKEND: Final = re.compile(r"Backend (?P<name>\w+) is not registered")

# XNNPACK keeps a pointer to the pool, so the pool's size may only change while no program is loaded (tried:
# changing it afterwards crashes). This set is how the process knows.
_loaded: Final[WeakSet[ExecuTorchRunner]] = WeakSet()


def load_executorch(folder: Path, program: ProgramFile, manifest: Manifest, threads: int | None) -> MethodRunner:
    """Load a ``.pte`` file with every method of it.

    `threads` sizes ExecuTorch's thread pool, which the process shares. Raises `ArtifactError` where the file is
    truncated, foreign or lacks what the manifest lists, and `UsageError` where another loaded program uses
    another number of threads.
    """
    path = folder / program.file
    check_header(path)
    try:
        binding = _binding()
    except ModuleNotFoundError as error:
        raise missing_engine(program, error) from error
    try:
        with caught_stderr(_NOISE) as log:
            _size_pool(binding, threads)
            native = binding._load_program(str(path), program_verification=binding.Verification.InternalConsistency)
            names = {native.get_method_name(index) for index in range(native.num_methods())}
            absent = [name for name in program.methods if name not in names]
            if absent:
                raise ArtifactError(f"{path} has no method {absent[0]!r}, which the manifest lists; export again")
            methods = {name: native.load_method(name) for name in program.methods}
    except RuntimeError as error:
        said = f"{error} ({log[-1]})" if log else str(error)
        missing = _MISSING_BACKEND.search(said)
        if missing is not None:
            raise ArtifactError(
                f"{path} has delegates of {missing['name']}, which this ExecuTorch runtime lacks (it has "
                f"{', '.join(sorted(binding._get_registered_backend_names()))}): run it where that back end is "
                "installed, or export for the target xnnpack; `triptych inspect` works here"
            ) from error
        raise ArtifactError(f"{path} does not load in ExecuTorch: {said}; export the model again") from error
    rows = owned_rows(manifest, program)
    state = {row.name: _live_tensor(methods, row, path) for row in rows}
    check_rows(state, rows, str(path))
    runner = ExecuTorchRunner(manifest, program, folder, native, methods, state)
    runner.reset_state()
    return runner


class ExecuTorchRunner(MethodRunner):
    """The methods of one loaded ``.pte`` file.

    While a method runs, OpenMP stays serial (see `triptych.runtime.threads`): the pool is the only parallelism.
    Outputs are copied out of the arena, which the next call overwrites.
    """

    def __init__(
        self,
        manifest: Manifest,
        program: ProgramFile,
        folder: Path,
        native: Any,
        methods: Mapping[str, Any],
        state: Mapping[str, Tensor],
    ) -> None:
        """Hold the native program, its methods and the tensors aliasing its state; see `load_executorch`."""
        super().__init__(manifest, program.methods, owned_rows(manifest, program), folder)
        self._native = native
        self._native_methods = dict(methods)
        self._state = dict(state)
        _loaded.add(self)

    @property
    def capabilities(self) -> Capabilities:
        """One engine, with live state."""
        return Capabilities(("executorch",))

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The state rows by name."""
        return self._state

    def _execute(self, method: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = [tensor.contiguous() for tensor in tensors]
        with serial_openmp() or nullcontext():
            try:
                outputs: list[Tensor] = self._native_methods[method](inputs, clone_outputs=True)
            except RuntimeError as error:
                raise RunError(f"ExecuTorch could not run {method}: {error}") from error
        return outputs

    def _release(self) -> None:
        # The order matters: tensors alias the methods' arenas, methods live in the program.
        self._state.clear()
        self._native_methods.clear()
        self._native = None
        _loaded.discard(self)


def check_header(path: Path) -> None:
    """Raise `ArtifactError` unless `path` begins like a ``.pte`` file and is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if head[4:8] != _IDENTIFIER:
        raise ArtifactError(
            f"{path} is no ExecuTorch program: bytes 4 to 8 are {head[4:8]!r}, expected {_IDENTIFIER!r}; export again"
        )
    if len(head) < _HEADER.size:
        raise ArtifactError(f"{path} is truncated: it has {size} bytes; export the model again")
    _, magic, _, program_size, segments_at, segments_size = _HEADER.unpack(head)
    if magic != _HEADER_MAGIC:
        return
    expected = max(program_size, segments_at + segments_size)
    if size < expected:
        raise ArtifactError(f"{path} is truncated: it has {size} bytes, its header says {expected}; export again")


def _binding() -> Any:
    """Import the native runtime with its custom and quantized kernels; raises `ModuleNotFoundError`."""
    from executorch.extension.pybindings import _portable_lib

    root = Path(_portable_lib.__file__).resolve().parents[2]
    for folder, stem in (
        ("kernels/quantized", "quantized_ops_aot_lib"),
        ("extension/llm/custom_ops", "custom_ops_aot_lib"),
    ):
        for library in sorted((root / folder).glob(f"*{stem}.*")):
            torch.ops.load_library(str(library))
    return _portable_lib


def _size_pool(binding: Any, threads: int | None) -> None:
    current = binding._threadpool_get_thread_count()
    if threads is None or threads == current:
        return
    if _loaded:
        raise UsageError(
            f"ExecuTorch already runs {len(_loaded)} program(s) with {current} threads in this process; "
            f"close them before you ask for {threads}"
        )
    binding._unsafe_reset_threadpool(threads)


def _live_tensor(methods: Mapping[str, Any], row: StateRow, path: Path) -> Tensor:
    """Return the tensor that aliases a state row in the program's arena."""
    users = [methods[name] for name in (*row.readers, *row.writers) if name in methods]
    if not users:
        raise ArtifactError(f"{path} owns the state row {row.name}, but none of its methods uses it; export again")
    try:
        tensor: Tensor = users[0].get_attribute(row.name)
    except RuntimeError as error:
        raise ArtifactError(
            f"{path} does not show its state row {row.name}: it was emitted without buffer names; export again"
        ) from error
    return tensor
