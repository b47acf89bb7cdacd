"""Finding passes and targets by name, lazily: nothing is imported until it is asked for.

Built-in passes are found by file name (``passes/swap_sdpa.py`` is ``swap-sdpa``), third parties' by the entry
point groups ``triptych.passes`` and ``triptych.targets``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from triptych.compiler.pass_kinds import Pass
from triptych.errors import PipelineError, TriptychError, UsageError

PASS_GROUP: Final = "triptych.passes"
PASS_PACKAGE: Final = "triptych.passes"


def built_in_names(package: str) -> dict[str, str]:
    """Return name → module of every file in `package`, without importing the files."""
    spec = importlib.util.find_spec(package)
    locations = list(spec.submodule_search_locations or []) if spec else []
    return {
        info.name.replace("_", "-"): f"{package}.{info.name}"
        for info in pkgutil.iter_modules(locations)
        if not info.name.startswith("_")
    }


def plugins(group: str) -> dict[str, EntryPoint]:
    """Return name → entry point of `group`; raises `UsageError` where two distributions claim one name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = found.get(point.name)
        if other is not None and other.value != point.value:
            raise UsageError(
                f"{point.name!r} in {group} is claimed by {owner(other)} and by {owner(point)}; uninstall one"
            )
        found[point.name] = point
    return found


def owner(point: EntryPoint) -> str:
    """Name the distribution behind an entry point."""
    return f"{point.dist.name} ({point.value})" if point.dist else point.value


def pass_names() -> tuple[str, ...]:
    """Return every known pass name, sorted."""
    return tuple(sorted({*built_in_names(PASS_PACKAGE), *plugins(PASS_GROUP)}))


def find_pass(name: str) -> type[Pass]:
    """Return the class of the pass called `name`; raises `PipelineError` for an unknown one."""
    found = resolve(name, built_in_names(PASS_PACKAGE), plugins(PASS_GROUP), Pass, "pass", PipelineError)
    pass_class: type[Pass] = found
    return pass_class


def resolve(
    name: str,
    built_in: dict[str, str],
    third_party: dict[str, EntryPoint],
    base: type[Any],
    kind: str,
    error: type[TriptychError],
) -> Any:
    """Import what is called `name` and return its one subclass of `base` with that `name`."""
    if name in built_in and name in third_party:
        raise UsageError(
            f"the {kind} {name!r} is built in and also claimed by {owner(third_party[name])}; uninstall that one"
        )
    if name in third_party:
        point = third_party[name]
        try:
            found = point.load()
        except (ImportError, AttributeError) as failure:
            raise UsageError(f"the {kind} {name!r} of {owner(point)} does not import: {failure}") from failure
        if not (isinstance(found, type) and issubclass(found, base)):
            raise UsageError(f"{owner(point)} claims to be the {kind} {name!r} and is no {base.__name__} class")
        return found
    if name not in built_in:
        known = ", ".join(sorted({*built_in, *third_party}))
        raise error(f"no {kind} is called {name!r}; known: {known}")
    module = importlib.import_module(built_in[name])
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, base) and value.__dict__.get("name") == name:
            return value
    raise error(f"{built_in[name]} defines no {kind} with name = {name!r}; a file name and its {kind} must agree")
