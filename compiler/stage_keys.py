"""Keys of cached stages: equal exactly where everything that a stage depends on is equal.

The key of a capture covers the versions of Python and torch, Triptych's own source, the model and the source
passes; the key of each later pass covers the key before it and the pass. Values are hashed by their structure:
tensors by their bytes, objects by their class and state, functions and classes by the file that defines them, by
the code that is loaded (the file may have changed since), and by the local modules that these use. Whatever cannot
be told apart in this way (a lock, a class typed into a shell) is never cached.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MappingProxyType, MethodType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from triptych.compiler.artifact import package_versions
from triptych.compiler.editing import storage_identity
from triptych.compiler.model import Model
from triptych.compiler.pipeline import CAPTURE, Pipeline

FORMAT: Final = "triptych-stages-1"
_ROOT: Final = Path(__file__).parents[1]
_STANDARD_LIBRARY: Final = sysconfig.get_path("stdlib")
_PACKAGE_FOLDERS: Final = frozenset({"site-packages", "dist-packages"})
# The hash() of a text, which is another in every process (transformers' GenerationConfig).
_VOLATILE: Final = frozenset({"_original_object_hash"})
_HOOK_TABLES: Final = tuple(
    name for name, value in vars(nn.Module()).items() if "hooks" in name and isinstance(value, dict)
)
_ATOMS: Final = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))


def digest(data: bytes | memoryview) -> str:
    """Return the hash that the cache knows `data` by."""
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def storage_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of the storage behind a tensor in main memory, without a copy."""
    whole: Any = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return memoryview(whole)


def _own_sources() -> str:
    files = sorted(path for part in ("compiler", "modules") for path in (_ROOT / part).rglob("*.py"))
    return digest(b"".join(path.relative_to(_ROOT).as_posix().encode() + path.read_bytes() for path in files))


# Read on import: what an editor does to the files later is not what runs here.
OWN_SOURCES: Final = _own_sources()


class Unidentified(Exception):  # noqa: N818 (a verdict that `step_keys` takes note of; no caller ever sees it)
    """Something that cannot be told apart from something else; the message says what."""


def step_keys(model: Model, done: Pipeline, pipeline: Pipeline, report: Callable[[str], None]) -> list[str]:
    """Return the key of the capture and of each pass after it, up to the first that cannot be cached.

    `done` are the passes that `model` went through before. `report` hears why there are fewer keys than steps.
    """
    keys: list[str] = []
    step = CAPTURE
    try:
        entries = [(e.name, e.roles, e.forward, e.inputs, e.outputs, e.examples) for e in model.entry_points]
        keys.append(_key(*_environment(), done.source, pipeline.source, model.metadata, entries, model.module))
        for one in pipeline.program:
            step = one.name
            keys.append(_key(keys[-1], one))
    except Exception as error:  # noqa: BLE001 (whatever a stranger's objects raise: the export goes on uncached)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        report(f"nothing is cached from {step} on: {reason}")
    return keys


def _environment() -> Iterator[object]:
    yield FORMAT
    yield OWN_SOURCES
    yield sys.version, platform.machine(), sys.byteorder
    yield torch.__version__, torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
    yield dict(package_versions())


def _key(*values: object) -> str:
    hasher = StructureHash()
    hasher.add(values)
    return hasher.hexdigest()


class StructureHash:
    """A hash over values by their structure; `add` raises `Unidentified` for what has none that tells it apart."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=20)
        # The objects are kept, so that no other can take the place in memory of one that was met.
        self._met: dict[int, tuple[int, object]] = {}
        self._storages: dict[int, int] = {}
        self._modules: set[str] = set()

    def hexdigest(self) -> str:
        """Return the hash of everything added so far."""
        return self._hash.hexdigest()

    def add(self, value: object) -> None:
        """Add a value; an object met before is a reference to it, so sharing and cycles are told apart."""
        if type(value) in _ATOMS:
            self._emit(type(value).__name__, value if isinstance(value, bytes) else repr(value).encode())
        elif type(value) is tuple:  # Which equal tuples are one object is up to the interpreter.
            self._emit("tuple", str(len(value)).encode())
            for item in value:
                self.add(item)
        elif id(value) in self._met:
            self._emit("again", str(self._met[id(value)][0]).encode())
        else:
            self._met[id(value)] = len(self._met), value
            _add(value, self)

    def _emit(self, kind: str, data: bytes | memoryview = b"") -> None:
        self._hash.update(f"{kind} {len(data)} ".encode())
        self._hash.update(data)

    # ---------------------------------------------------------------------------------------------------- data

    def add_items(self, container: type, items: Iterable[Any]) -> None:
        """Add a container that is its items in order."""
        listed = tuple(items)
        self.add((container.__qualname__, listed))

    def add_set(self, items: Iterable[Any]) -> None:
        """Add a container that is its items in no order."""
        self._emit("set", "".join(sorted(_key(item) for item in items)).encode())

    def add_text(self, value: object) -> None:
        """Add a value that its text tells apart."""
        self._emit(type(value).__qualname__, str(value).encode())

    def add_tensor(self, tensor: Any) -> None:
        """Add a tensor: class, layout and bytes, the latter once for all tensors that share the storage."""
        self.add((type(tensor), tensor.dtype, tuple(tensor.shape), tensor.requires_grad))
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            self.add((context, tuple((name, getattr(tensor, name)) for name in names)))
            return
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise Unidentified(f"a tensor is on {tensor.device} with layout {tensor.layout}, not plainly in memory")
        self.add((tensor.stride(), tensor.storage_offset(), tensor.is_conj(), tensor.is_neg()))
        known = len(self._storages)
        number = self._storages.setdefault(storage_identity(tensor), known)
        self._emit("storage", storage_bytes(tensor) if number == known else str(number).encode())

    def add_object(self, value: object) -> None:
        """Add any other object: its class, and the state that a copy of it would be made from."""
        self.add(type(value))
        if isinstance(value, nn.Module):
            self.add(_module_state(value))
            return
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced = reduce(value) if reduce else value.__reduce_ex__(4)
        except Exception as error:
            raise Unidentified(f"a {type(value).__qualname__} says nothing of itself ({error})") from error
        if isinstance(reduced, str):
            self.add(reduced)
            return
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        if isinstance(state, dict):
            state = {name: part for name, part in state.items() if name not in _VOLATILE}
        self.add((make, arguments, state, tuple(items or ()), tuple(pairs or ())))

    # ---------------------------------------------------------------------------------------------------- code

    def add_function(self, function: FunctionType) -> None:
        """Add a function: its module, its code, its defaults and what it closes over."""
        self.add_module(function.__module__)
        self.add((function.__qualname__, function.__code__, function.__defaults__, function.__kwdefaults__))
        self.add(tuple(map(_content, function.__closure__ or ())))

    def add_built_in(self, function: BuiltinFunctionType) -> None:
        """Add a function that is not written in Python."""
        owner = getattr(function, "__self__", None)
        self.add((function.__module__, function.__qualname__, None if isinstance(owner, ModuleType) else owner))

    def add_code(self, code: CodeType) -> None:
        """Add compiled code, apart from where it stands."""
        self.add((code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_consts))

    def add_class(self, found: type) -> None:
        """Add a class and its bases: their modules, and the members of those that are local."""
        for one in found.__mro__[:-1]:
            self.add((one.__module__, one.__qualname__))
            if self.add_module(one.__module__):
                self._add_members(one)

    def add_module(self, name: str) -> bool:
        """Add the source of a module, and what its global names stand for where it is local; return whether it is."""
        module = sys.modules.get(name)
        if module is None:
            raise Unidentified(f"the source of {name} cannot be found")
        is_local = _is_local(module)
        if name not in self._modules:
            self._modules.add(name)
            top = sys.modules.get(name.partition(".")[0])
            # Not by getattr, which would ask a lazy package to import something or to warn.
            version = str(vars(top).get("__version__")) if top is not None else None
            self.add((name, version, _source_digest(module, is_local=is_local)))
            if is_local:
                for key, value in list(vars(module).items()):
                    self._add_global(name, key, value)
        return is_local

    def _add_global(self, module: str, name: str, value: object) -> None:
        home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", module)
        if isinstance(value, (ModuleType, FunctionType, type)) and home != module:
            if home in sys.modules:
                self.add_module(home)
        elif isinstance(value, type):
            self._add_members(value)
        elif isinstance(value, FunctionType) or name.isupper():
            self._add_member(name, value)

    def _add_members(self, found: type) -> None:
        for name, member in list(vars(found).items()):
            self._add_member(name, getattr(member, "__func__", getattr(member, "fget", member)))

    def _add_member(self, name: str, value: object) -> None:
        """Add what a name of a local module or class stands for, as far as it is code or a plain value."""
        if isinstance(value, FunctionType) or (type(value) in _ATOMS and not name.startswith("__")):
            self.add((name, value))


def _is_local(module: ModuleType) -> bool:
    """True for what is under work: modules that are neither installed nor Triptych's own, its passes aside."""
    name = module.__name__
    top = name.partition(".")[0]
    if top == "triptych" and not name.startswith("triptych.passes."):
        return False
    files = [getattr(one, "__file__", None) for one in (module, sys.modules.get(top))]
    if files == [None, None] and not hasattr(module, "__path__"):
        return False
    return not any(file is not None and _is_installed(Path(file)) for file in files)


def _is_installed(path: Path) -> bool:
    return path.is_relative_to(_STANDARD_LIBRARY) or not _PACKAGE_FOLDERS.isdisjoint(path.parts)


def _source_digest(module: ModuleType, *, is_local: bool) -> str | None:
    """Return the hash of the file that defines a module, None where there is none to be read."""
    file = getattr(module, "__file__", None)
    origin = getattr(module.__spec__, "origin", None)
    if file is None and (origin in ("built-in", "frozen") or hasattr(module, "__path__")):
        return None
    if file is None:
        raise Unidentified(f"the source of {module.__name__} cannot be found")
    path = Path(file)
    if not is_local and (path.suffix != ".py" or not path.is_file()):
        return None
    try:
        return digest(path.read_bytes())
    except OSError as error:
        raise Unidentified(f"the source {path} cannot be read ({error.strerror})") from error


def _module_state(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of a module; its hooks are numbered anew, as torch counts those of the whole process."""
    state = dict(vars(module))
    tables = {name: state[name] for name in _HOOK_TABLES if name in state}
    numbers = {key: number for number, key in enumerate(sorted({key for table in tables.values() for key in table}))}
    return state | {name: {numbers[key]: hook for key, hook in table.items()} for name, table in tables.items()}


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # a name that is not bound yet
        return None


@functools.singledispatch
def _add(value: object, into: StructureHash) -> None:
    into.add_object(value)


_add.register(list, lambda value, into: into.add_items(list, value))
_add.register(tuple, lambda value, into: into.add_items(type(value), value))
_add.register(dict, lambda value, into: into.add_items(type(value), value.items()))
_add.register(MappingProxyType, lambda value, into: into.add_items(dict, value.items()))
_add.register(set, lambda value, into: into.add_set(value))
_add.register(frozenset, lambda value, into: into.add_set(value))
_add.register(Tensor, lambda value, into: into.add_tensor(value))
_add.register(type, lambda value, into: into.add_class(value))
_add.register(FunctionType, lambda value, into: into.add_function(value))
_add.register(BuiltinFunctionType, lambda value, into: into.add_built_in(value))
_add.register(MethodType, lambda value, into: into.add((value.__func__, value.__self__)))
_add.register(CodeType, lambda value, into: into.add_code(value))
_add.register(ModuleType, lambda value, into: into.add((value.__name__, into.add_module(value.__name__))))
for _class in (Enum, PurePath, torch.dtype, torch.device, torch.layout, torch.memory_format, OpOverload):
    _add.register(_class, lambda value, into: into.add_text(value))
