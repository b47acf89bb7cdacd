"""`CompositeRunner`: one artifact over several engines, with one state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from triptych.errors import ArtifactError
from triptych.manifest import Manifest
from triptych.runtime.method_runner import Capabilities, MethodRunner


class CompositeRunner(MethodRunner):
    """Gives each method its engine.

    Every state row has exactly one owner; a runner whose methods read or write a row that it does not own is
    handed the owner's live tensor.
    """

    def __init__(self, manifest: Manifest, runners: Mapping[str, MethodRunner]) -> None:
        """Join `runners`, by program file. Raises `ArtifactError` where a method or a row has no or two runners."""
        by_method: dict[str, MethodRunner] = {}
        for file, runner in runners.items():
            for method in runner.methods:
                if method in by_method:
                    raise ArtifactError(f"method {method!r} is in {file} and in another program file; export again")
                by_method[method] = runner
        missing = [name for name in manifest.methods if name not in by_method]
        if missing:
            raise ArtifactError(f"no program file holds the method {missing[0]!r} of the manifest; export again")
        super().__init__(manifest, tuple(manifest.methods), manifest.state)
        self._runners = dict(runners)
        self._by_method = by_method
        self._state = self._share_state(manifest)

    def _share_state(self, manifest: Manifest) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for row in manifest.state:
            if row.owner not in self._runners:
                raise ArtifactError(
                    f"state row {row.name} belongs to {row.owner}, which is no program file; export again"
                )
            state[row.name] = self._runners[row.owner].state[row.name]
        for file, runner in self._runners.items():
            methods = set(runner.methods)
            foreign = {
                row.name: state[row.name]
                for row in manifest.state
                if row.owner != file and not methods.isdisjoint((*row.readers, *row.writers))
            }
            if foreign:
                runner.bind_state(foreign)
        return state

    @property
    def capabilities(self) -> Capabilities:
        """The engines of all parts; state is live where it is in every part."""
        parts = [runner.capabilities for runner in self._runners.values()]
        engines = tuple(dict.fromkeys(engine for part in parts for engine in part.engines))
        return Capabilities(engines, live_state=all(part.live_state for part in parts))

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The state rows by name."""
        return self._state

    def _execute(self, method: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._by_method[method]._execute(method, tensors)  # noqa: SLF001 (checked once, here)

    def reset_state(self, used: int | None = None) -> None:
        """Let every runner restore the rows it owns."""
        for runner in self._runners.values():
            runner.reset_state(used)

    def _release(self) -> None:
        self._state = {}
        for runner in self._runners.values():
            runner.close()
