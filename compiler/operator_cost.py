"""What one operator of a graph costs at stated sizes: FLOPs, bytes read and written, and whether it is a view.

`triptych.compiler.cost` says what these numbers mean and adds them up over a method.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import SymInt, Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import Node, map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.value_ranges import bound_sympy
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

from triptych.compiler.capture import user_input_values
from triptych.compiler.editing import storage_identity
from triptych.compiler.program import Method
from triptych.errors import UsageError
from triptych.manifest import DynamicDim

# Attention kernels that torch has no formula for, with the axis of their heads.
_ATTENTIONS: Final = {"llama::custom_sdpa": 2, "aten::_scaled_dot_product_flash_attention_for_cpu": 1}
# Operators that read as many elements of their first tensor as they return.
_LOOKUPS: Final = frozenset({"aten::embedding", "aten::gather", "aten::index", "aten::index_select"})
# Operators that write as much of their destination as the argument of this name holds, and read none of it.
_ROW_WRITES: Final = {
    "aten::index_copy_": "source",
    "aten::index_put_": "values",
    "aten::scatter_": "src",
    "llama::update_cache": "value",
    "triptych::update_cache": "value",
    "triptych::update_quantized_cache": "value",
    "triptych::update_ring_cache": "value",
}
_OVERWRITES: Final = frozenset({"aten::copy_", "aten::fill_", "aten::zero_"})
_SHAPE_QUERIES: Final = frozenset({"aten::sym_size", "aten::sym_stride", "aten::sym_numel", "aten::sym_storage_offset"})
# What torch puts for "no upper bound" where it does not put infinity.
_UNBOUNDED: Final = sys.maxsize - 1
_DEQUANTIZATIONS: Final = frozenset({"torchao::dequantize_affine"})


def dynamic_dims(method: Method) -> dict[str, DynamicDim]:
    """Return the dynamic dimensions of a method's inputs by name."""
    return {dim.name: dim for port in method.inputs for dim in port.shape if isinstance(dim, DynamicDim)}


class Sizes:
    """Symbolic sizes of one method as numbers, each expression evaluated once.

    `sizes` gives dynamic dimensions by name; the others stand at their maximum, and what only a run decides at its
    upper bound. Raises `UsageError` for a size outside its bounds.
    """

    def __init__(self, name: str, method: Method, sizes: Mapping[str, int]) -> None:
        chosen = {}
        for dim in dynamic_dims(method).values():
            chosen[dim.name] = sizes.get(dim.name, dim.maximum)
            if not dim.minimum <= chosen[dim.name] <= dim.maximum:
                raise UsageError(f"{dim.name} is {sizes[dim.name]}; {name} takes {dim.minimum} to {dim.maximum}")
        values = user_input_values(method.exported)
        self._symbols = {
            size.node.expr: chosen[dim.name]
            for port in method.inputs
            for size, dim in zip(values[port.name].shape, port.shape, strict=True)
            if isinstance(dim, DynamicDim) and isinstance(size, SymInt)
        }
        self._ranges = method.exported.range_constraints
        self._values: dict[Any, int] = {}

    def number(self, size: int | SymInt) -> int:
        """Return `size` as a number; raises `UsageError` where a run decides it and it has no bound."""
        if not isinstance(size, SymInt):
            return size
        expression = size.node.expr
        if expression not in self._values:
            ranges = {**size.node.shape_env.var_to_range, **self._ranges}
            upper = bound_sympy(expression.subs(self._symbols), ranges).upper
            if not upper.is_Integer or upper >= _UNBOUNDED:
                raise UsageError(
                    f"a run decides the size {expression} and nothing bounds it; bound it in the model with "
                    "torch._check(size <= …)"
                )
            self._values[expression] = int(upper)
        return self._values[expression]

    def numbers(self, sizes: Any) -> tuple[int, ...]:
        """Return the numbers behind a shape or strides."""
        return tuple(map(self.number, sizes))

    def nbytes(self, tensor: Tensor) -> int:
        """Return the bytes under a tensor; elements that it repeats (stride 0) count once."""
        layout = zip(self.numbers(tensor.shape), self.numbers(tensor.stride()), strict=True)
        return int(tensor.element_size()) * math.prod(size for size, stride in layout if stride != 0)


class OperatorCosts:
    """Costs of the operators of one method. Every node here calls an `OpOverload`, but for `nbytes`."""

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._ran: dict[tuple[object, str], tuple[int, int | None]] = {}

    def nbytes(self, node: Node) -> int:
        """Return the bytes under all tensors of the node's value."""
        return sum(self._sizes.nbytes(one) for one in _tensors(node))

    def dequantizes(self, node: Node) -> bool:
        """Return whether the operator gives a quantized tensor its float values."""
        return _schema(node).name in _DEQUANTIZATIONS

    def traffic(self, node: Node, stored: Mapping[Node, int]) -> tuple[int, int]:
        """Return bytes read and written by an operator that gives no view; `stored` overrides sizes of inputs."""
        name, destinations = _schema(node).name, _destinations(node)
        source = _arguments(node).get(_ROW_WRITES.get(name, ""))
        rows = isinstance(source, Node)
        written = self.nbytes(source) if isinstance(source, Node) else sum(map(self.nbytes, destinations))
        if self.returned_destination(node) is None:
            written += self.nbytes(node)
        read = 0
        for index, used in enumerate(node.all_input_nodes):
            if name in _SHAPE_QUERIES or (used in destinations and (rows or name in _OVERWRITES)):
                continue
            nbytes = stored.get(used, self.nbytes(used))
            if name in _LOOKUPS and index == 0:
                nbytes = self.nbytes(node) * nbytes // max(1, self.nbytes(used))
            read += nbytes
        return read, written

    def returned_destination(self, node: Node) -> Node | None:
        """Return the input that the operator writes into and returns, as in-place operators of torch do."""
        returns_alias = any(result.alias_info is not None for result in _schema(node).returns)
        return next(iter(_destinations(node)), None) if returns_alias else None

    def flops_and_view(self, node: Node) -> tuple[int, Node | None]:
        """Return the FLOPs, and the input that the result is a view of, if it is one."""
        target, schema = node.target, _schema(node)
        assert isinstance(target, OpOverload)
        if schema.name in _ATTENTIONS:
            shapes = [self._with_heads_second(used, _ATTENTIONS[schema.name]) for used in node.all_input_nodes[:3]]
            return int(sdpa_flop_count(*shapes)), None
        if schema.is_mutable or not _tensors(node):
            return 0, None
        is_composite = target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd)
        if not is_composite and target.overloadpacket not in flop_registry:
            return 0, _viewed(node)
        key = target, repr(map_arg((node.args, node.kwargs), self._description))
        if key not in self._ran:
            self._ran[key] = self._run_without_data(node)
        flops, index = self._ran[key]
        return flops, None if index is None else node.all_input_nodes[index]

    def _run_without_data(self, node: Node) -> tuple[int, int | None]:
        """Let torch take the operator apart and count; return FLOPs and which input the result is a view of."""
        # Of the kernels for attention, the one made of matrix products is counted on every device.
        with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            inputs = {used: self._fake(used) for used in node.all_input_nodes}
            args, kwargs = map_arg((node.args, node.kwargs), lambda used: inputs[used])
            try:
                results = tree_leaves(node.target(*args, **kwargs))  # type: ignore[operator]
            except (DataDependentOutputException, DynamicOutputShapeException):
                return 0, None
        results = [storage_identity(one) for one in results if isinstance(one, Tensor)]
        for index, value in enumerate(inputs.values()):
            if isinstance(value, Tensor) and set(results) == {storage_identity(value)}:
                return counter.get_total_flops(), index
        return counter.get_total_flops(), None

    def _fake(self, node: Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape, strides = self._sizes.numbers(value.shape), self._sizes.numbers(value.stride())
            return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)
        return self._sizes.number(value) if isinstance(value, SymInt) else value

    def _description(self, node: Node) -> Any:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            layout = self._sizes.numbers(value.shape), self._sizes.numbers(value.stride())
            return f"{layout} {value.dtype} {value.device}"
        return self._sizes.number(value) if isinstance(value, SymInt) else value

    def _with_heads_second(self, node: Node, heads: int) -> tuple[int, ...]:
        """Return [B, H, S, D] of a value whose heads stand on the axis `heads`."""
        sizes = list(self._sizes.numbers(node.meta["val"].shape))
        sizes.insert(1, sizes.pop(heads))
        return tuple(sizes)


def _tensors(node: Node) -> list[Tensor]:
    return [one for one in tree_leaves(node.meta.get("val")) if isinstance(one, Tensor)]


def _schema(node: Node) -> Any:
    assert isinstance(node.target, OpOverload)
    return node.target._schema


def _arguments(node: Node) -> dict[str, Any]:
    """Return the arguments by the names that the operator's schema gives them."""
    names = [argument.name for argument in _schema(node).arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _destinations(node: Node) -> list[Node]:
    """Return the inputs that the operator writes into."""
    arguments = _arguments(node)
    return [
        arguments[argument.name]
        for argument in _schema(node).arguments
        if argument.is_write and isinstance(arguments.get(argument.name), Node)
    ]


def _viewed(node: Node) -> Node | None:
    """Return the input that every result aliases without a write, by the operator's schema."""
    schema, arguments = _schema(node), _arguments(node)
    if not schema.returns or any(result.alias_info is None for result in schema.returns):
        return None
    aliased = (arguments.get(one.name) for one in schema.arguments if one.alias_info is not None)
    return next((value for value in aliased if isinstance(value, Node)), None)
