"""Thread counts around engine calls, set and restored.

Two facts shape this module (measured with torch 2.13 and ExecuTorch 1.4.1 on Linux, two cores):

- ExecuTorch runs `llama::custom_sdpa` on threads of its own pool, and each of them calls MKL, which opens an
  OpenMP team per pool thread. After `torch.set_num_threads(1)` a prefill of 512 tokens took 4.6 s instead of
  0.13 s: the teams' spinning workers hold the cores that the pool needs. `torch.set_num_threads` cannot help,
  because it reaches the calling thread only.
- `omp_set_max_active_levels(0)` makes every parallel region serial. In the libgomp that torch ships (OpenMP
  5.0) the value belongs to the process, so it reaches the pool's threads, costs about a microsecond a call
  and needs no environment variable, whatever was imported first. Without `set_num_threads` it saves 13 %.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from triptych.errors import UsageError


def check_thread_count(count: int | None) -> None:
    """Raise `UsageError` unless `count` is None or at least 1."""
    if count is not None and count < 1:
        raise UsageError(f"threads is {count}; expected at least 1, or none for the engine's own choice")


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Run the block with `count` torch threads and restore the caller's number; None leaves it alone."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SerialOpenMP:
    """Keeps OpenMP regions serial while any caller is inside; the process's own limit is restored by the last."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._get = library.omp_get_max_active_levels
        self._set = library.omp_set_max_active_levels
        self._set.argtypes = [ctypes.c_int]
        self._set.restype = None
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._before = self._get()
                self._set(0)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(self._before)


@functools.cache
def serial_openmp() -> SerialOpenMP | None:
    """Return the guard over the OpenMP library torch is linked with, or None where torch uses none."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).is_file():
            # The lookup through torch's library finds the very OpenMP it is linked with, wherever that lies.
            library = ctypes.CDLL(str(folder / name))
            try:
                return SerialOpenMP(library)
            except AttributeError:
                return None
    return None
