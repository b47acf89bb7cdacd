"""Passes that spell the same computation otherwise; each fires in any model of the Llama kind, in all its methods."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method
from triptych.compiler.rewrite_rule import RewriteRule

aten = torch.ops.aten


@dataclass(frozen=True)
class SiluAsSigmoid(RewriteRule):
    """``silu(x)`` is x sigmoid(x)."""

    name: ClassVar[str] = "silu-as-sigmoid"
    uniform: ClassVar[bool] = True

    def pattern(self, x: Tensor) -> Tensor:
        return aten.silu(x)

    def replacement(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@dataclass(frozen=True)
class LinearAsMatmul(RewriteRule):
    """``linear(x, w)`` is x wᵀ."""

    name: ClassVar[str] = "linear-as-matmul"
    uniform: ClassVar[bool] = True

    def pattern(self, x: Tensor, weight: Tensor) -> Tensor:
        return aten.linear(x, weight)

    def replacement(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.matmul(x, weight.t())


@dataclass(frozen=True)
class SpellOutRmsNorm(RewriteRule):
    """``rsqrt(mean(x²) + eps)`` is 1 / √(Σ x·x / width + eps)."""

    name: ClassVar[str] = "spell-out-rms-norm"
    uniform: ClassVar[bool] = True
    interior_may_be_shared: ClassVar[bool] = True

    def pattern(self, x: Tensor, eps: float) -> Tensor:
        return aten.rsqrt(aten.add(aten.mean(aten.pow(x, 2), [-1], True), eps))

    def replacement(self, x: Tensor, eps: float) -> Tensor:
        return 1.0 / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)


@dataclass(frozen=True)
class WeighBeforeScaling(RewriteRule):
    """``w · (x · r)`` is (w · x) · r, where nothing is cast in between."""

    name: ClassVar[str] = "weigh-before-scaling"
    uniform: ClassVar[bool] = True

    def pattern(self, x: Tensor, eps: float, weight: Tensor, dtype: torch.dtype) -> Tensor:
        root = aten.rsqrt(aten.add(aten.mean(aten.pow(x, 2), [-1], True), eps))
        return aten.mul(weight, aten.to.dtype(aten.mul(x, root), dtype))

    def replacement(self, x: Tensor, eps: float, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return (weight * x).to(dtype) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@dataclass(frozen=True)
class RotateThenNegate(RewriteRule):
    """``cat(-second, first)``, the rotated half of rotary embeddings, is x rolled by half its width, times ∓1."""

    name: ClassVar[str] = "rotate-then-negate"
    uniform: ClassVar[bool] = True

    def pattern(self, x: Tensor, half: int, end: int) -> Tensor:
        return aten.cat([aten.neg(aten.slice(x, 3, half, end)), aten.slice(x, 3, 0, half)], -1)

    def replacement(self, x: Tensor, half: int, end: int) -> Tensor:
        signs = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.roll(x, half, -1) * torch.cat([-signs[:half], signs[half:]])


@dataclass(frozen=True)
class FuseLinears(GraphPass):
    """Linear layers without bias over one value become one layer over their weights in a row, and slices of it."""

    name: ClassVar[str] = "fuse-linears"
    uniform: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        groups: dict[object, list[Node]] = {}
        for node in editor.calls(aten.linear.default):
            if len(node.args) == 2:
                groups.setdefault(node.args[0], []).append(node)
        for group in groups.values():
            if len(group) > 1 and log.match(group[0]):
                self._fuse(editor, group)

    def _fuse(self, editor: GraphEditor, group: list[Node]) -> None:
        first = group[0]
        bounds = list(accumulate((node.meta["val"].shape[-1] for node in group), initial=0))
        with editor.graph.inserting_before(first):
            weights = editor.call(aten.cat.default, [node.args[1] for node in group], like=first)
            whole = editor.call(aten.linear.default, first.args[0], weights, like=first)
            for node, (start, end) in zip(group, pairwise(bounds), strict=True):
                node.replace_all_uses_with(editor.call(aten.slice.Tensor, whole, -1, start, end, like=node))
        for node in group:
            editor.graph.erase_node(node)


@dataclass(frozen=True)
class SpellOutAttention(GraphPass):
    """Attention in aten becomes products and a softmax; the vision tower's as well as the cached."""

    name: ClassVar[str] = "spell-out-attention"
    uniform: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        for node in editor.calls(aten.scaled_dot_product_attention.default):
            if log.match(node):
                editor.inline(node, attention)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention over [B, H, S, D] as it is defined; `mask` is true where a query may look."""
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, -1) @ value


@dataclass(frozen=True)
class CommonSubexpressions(GraphPass):
    """Calls of one operator on the same arguments become one call; what reads state or writes stays."""

    name: ClassVar[str] = "common-subexpressions"

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        written = {node.args[0] for node in editor.graph.nodes if node.op == "call_function" and node.is_impure()}
        known: dict[str, Node] = {}
        for node in list(editor.graph.nodes):
            if node.op != "call_function" or node.is_impure() or written & set(node.all_input_nodes):
                continue
            first = known.setdefault(f"{node.target} {node.args} {node.kwargs}", node)
            if first is not node and log.match(node):
                node.replace_all_uses_with(first)
                editor.graph.erase_node(node)


RIGHT: Final = (
    SiluAsSigmoid(),
    FuseLinears(),
    LinearAsMatmul(),
    WeighBeforeScaling(),
    SpellOutRmsNorm(),
    RotateThenNegate(),
    SpellOutAttention(),
    CommonSubexpressions(),
)
"""In an order in which none takes away what a later one looks for; attention must be in aten."""
