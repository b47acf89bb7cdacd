"""From a program file to a `MethodRunner`: engines are found by name and imported on first use.

A loader is a callable ``(folder, program, manifest, threads) -> MethodRunner``. Two are built in; others
register under the entry-point group ``triptych.loaders`` with the engine's name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Final

from triptych.errors import ArtifactError, UsageError
from triptych.manifest import Manifest, ProgramFile
from triptych.runtime.composite import CompositeRunner
from triptych.runtime.method_runner import MethodRunner
from triptych.runtime.threads import check_thread_count

Loader = Callable[[Path, ProgramFile, Manifest, int | None], MethodRunner]

ENTRY_POINT_GROUP: Final = "triptych.loaders"
_BUILT_IN: Final = {
    "eager": "triptych.runtime.loaders.eager:load_eager",
    "executorch": "triptych.runtime.loaders.executorch:load_executorch",
}


def loader_names() -> dict[str, str]:
    """Return engine name → ``module:function`` of every known loader; imports none of them.

    Raises `UsageError` where two claim one name, naming both.
    """
    found = dict(_BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if found.setdefault(point.name, point.value) != point.value:
            raise UsageError(
                f"two loaders claim the engine {point.name!r}: {found[point.name]} and {point.value}; uninstall one"
            )
    return found


def load_runner(folder: Path, manifest: Manifest, threads: int | None = None) -> MethodRunner:
    """Load every program file of the artifact in `folder` and return one runner over all of its methods.

    `threads` is the number of CPU threads of an engine, None for its own choice. Raises `ArtifactError` where
    a file is missing or broken or its engine is unknown or not installed, `UsageError` on impossible threads.
    """
    check_thread_count(threads)
    if not manifest.programs:
        raise ArtifactError(f"the manifest in {folder} lists no program file; export the model again")
    known = loader_names()
    loaders = [_loader(program, known) for program in manifest.programs]
    for program in manifest.programs:
        if not (folder / program.file).exists():
            raise ArtifactError(f"{folder} lacks {program.file}, which its manifest lists; export the model again")
    runners: dict[str, MethodRunner] = {}
    try:
        for program, loader in zip(manifest.programs, loaders, strict=True):
            runners[program.file] = loader(folder, program, manifest, threads)
        return next(iter(runners.values())) if len(runners) == 1 else CompositeRunner(manifest, runners)
    except BaseException:
        for runner in runners.values():
            runner.close()
        raise


def _loader(program: ProgramFile, known: dict[str, str]) -> Loader:
    if program.engine not in known:
        raise ArtifactError(
            f"{program.file} needs the engine {program.engine!r}; known are {', '.join(sorted(known))}: "
            f"install a package that registers it under the entry point {ENTRY_POINT_GROUP}"
        )
    module, _, function = known[program.engine].partition(":")
    try:
        loader: Any = getattr(import_module(module), function)
    except ModuleNotFoundError as error:
        raise missing_engine(program, error) from error
    return loader  # type: ignore[no-any-return]


def missing_engine(program: ProgramFile, error: ModuleNotFoundError) -> ArtifactError:
    """Return the error for an engine whose package is not installed."""
    return ArtifactError(
        f"{program.file} needs the engine {program.engine!r}, but the module {error.name} is not installed: "
        f"pip install 'triptych[{program.engine}]'"
    )
