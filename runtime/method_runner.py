"""`MethodRunner`, the one seam between generation and the engines that run compiled methods.

A loader (see `triptych.runtime.loaders`) makes one for each program file; `CompositeRunner` joins several;
`FakeRunner` stands in for them in tests. Everything above the seam is engine-neutral.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from triptych.errors import ArtifactError, RunError
from triptych.manifest import Manifest, MethodSignature, ProgramFile, StateRow
from triptych.runtime.signatures import check_inputs
from triptych.runtime.state import restore_rows


@dataclass(frozen=True)
class Capabilities:
    """What a runner can do: the names of its engines, and whether `state` aliases the engine's own memory."""

    engines: tuple[str, ...]
    live_state: bool = True


class MethodRunner(ABC):
    """Runs the methods of one artifact by name.

    One runner serves one caller at a time. A subclass gives `capabilities`, `state` and `_execute`, and frees
    what it holds in `_release`.
    """

    def __init__(
        self, manifest: Manifest, methods: Sequence[str], rows: Sequence[StateRow], folder: Path | None = None
    ) -> None:
        """Serve `methods` of `manifest` and own the state `rows`.

        `folder` is the artifact's, where rows with ``initial="file"`` find ``state.safetensors``.
        Raises `ArtifactError` where the manifest has no signature for a method.
        """
        for name in methods:
            if name not in manifest.methods:
                raise ArtifactError(f"the manifest has no signature for method {name!r}; export the model again")
        self._signatures = {name: manifest.methods[name] for name in methods}
        self._rows = tuple(rows)
        self._folder = folder
        self._closed = False

    @property
    @abstractmethod
    def capabilities(self) -> Capabilities:
        """What this runner can do."""

    @property
    @abstractmethod
    def state(self) -> Mapping[str, Tensor]:
        """The state rows by name, live: writing into a tensor changes what the next call reads.

        The tensors alias the engine's memory: do not use them after `close`.
        """

    @abstractmethod
    def _execute(self, method: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run `method` on checked tensors in signature order; return its outputs in signature order.

        The outputs belong to the caller: a later call must not overwrite them.
        """

    def bind_state(self, rows: Mapping[str, Tensor]) -> None:
        """Use these tensors, which another engine owns, as the memory of the rows so named.

        Raises `ArtifactError` where the engine cannot.
        """
        engines = ", ".join(self.capabilities.engines)
        names = ", ".join(sorted(rows))
        raise ArtifactError(
            f"engine {engines} cannot use state that another engine owns ({names}); export for one engine"
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods, in the manifest's order."""
        return tuple(self._signatures)

    def signature(self, method: str) -> MethodSignature:
        """Return what `method` takes and gives; raises `RunError` where there is none of that name."""
        if method not in self._signatures:
            raise RunError(f"no method {method!r}; this runner has {', '.join(self._signatures)}")
        return self._signatures[method]

    def run(self, method: str, **tensors: Tensor) -> dict[str, Tensor]:
        """Run one method on inputs by name and return its outputs by name.

        Raises `RunError` where an input is missing, unknown, or of another dtype or shape than the signature
        says (bounds of dynamic dimensions and equality of dimensions of one name included), or the engine
        failed.
        """
        if self._closed:
            raise RunError(f"method {method!r} was called on a closed runner; load the artifact again")
        signature = self.signature(method)
        outputs = self._execute(method, check_inputs(method, signature, tensors))
        if len(outputs) != len(signature.outputs):
            raise RunError(
                f"{method} gave {len(outputs)} outputs, its signature names {len(signature.outputs)}; export again"
            )
        return {port.name: tensor for port, tensor in zip(signature.outputs, outputs, strict=True)}

    def reset_state(self, used: int | None = None) -> None:
        """Put the initial values back into the rows this runner owns.

        With `used`, rows with a slot axis (an "S" in their layout) are restored in their first `used` slots
        only, for callers who know that nothing was written behind. Raises `RunError` on a closed runner.
        """
        if self._closed:
            raise RunError("the runner is closed; load the artifact again")
        restore_rows(self.state, self._rows, self._folder, used)

    def close(self) -> None:
        """Free what the runner holds. May be called twice."""
        if not self._closed:
            self._closed = True
            self._release()

    def _release(self) -> None:  # noqa: B027 (a runner that holds nothing needs none)
        """Free the engine's objects; called once."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def owned_rows(manifest: Manifest, program: ProgramFile) -> tuple[StateRow, ...]:
    """Return the state rows that `program`'s engine allocates."""
    return tuple(row for row in manifest.state if row.owner == program.file)
