"""Operators that programs call and torch alone does not have: which they are, and who registers them.

A program on disk holds their names only. Triptych's own are registered by importing `triptych.modules.operators`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from operator import attrgetter
from types import MappingProxyType
from typing import Final

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule

from triptych.compiler.program import Program
from triptych.compiler.targets.custom_ops import register_llama_operators
from triptych.errors import LoweringError
from triptych.modules import operators as _neutral_operators  # noqa: F401 (registers them)

TORCH_NAMESPACES: Final = ("aten", "prim", "prims", "higher_order")
"""Where torch's own operators live."""

_LIBRARIES: Final[Mapping[str, Callable[[], object]]] = MappingProxyType(
    {
        "llama": register_llama_operators,
        "quantized_decomposed": register_llama_operators,
        # By name, as a program may call these operators although nothing here quantizes.
        "torchao": lambda: importlib.import_module("torchao.quantization"),
    }
)


class MissingOperatorError(Exception):
    """A program calls an operator that cannot be registered in this process; the message names it."""


def custom_operators(program: Program) -> set[str]:
    """Return the names of the custom operators in `program`, such as "llama.update_cache.default"."""
    modules = (module for method in program.methods.values() for module in method.exported.graph_module.modules())
    graphs = [module.graph for module in modules if isinstance(module, GraphModule)]
    targets = {node.target for graph in graphs for node in graph.nodes if isinstance(node.target, OpOverload)}
    return {str(target) for target in targets if target.namespace not in TORCH_NAMESPACES}


def require_operator(name: str) -> None:
    """See to it that an operator is registered; raises `MissingOperatorError` where nobody here can do that."""
    if _is_registered(name):
        return
    register = _LIBRARIES.get(name.partition(".")[0])
    try:
        if register is not None:
            register()
    except (ImportError, LoweringError) as error:
        raise MissingOperatorError(f"the program calls {name}, and {error}") from error
    if not _is_registered(name):
        raise MissingOperatorError(f"the program calls {name}, which nothing registers; import the library it is from")


def _is_registered(name: str) -> bool:
    try:
        return isinstance(attrgetter(name)(torch.ops), OpOverload)
    except AttributeError:
        return False
