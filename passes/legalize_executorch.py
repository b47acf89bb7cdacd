"""``legalize-executorch``: neutral operators become ExecuTorch's kernels."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.compiler.first_position import is_first_position
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method
from triptych.compiler.targets.custom_ops import register_llama_operators
from triptych.modules.operators import REFERENCE_KERNELS
from triptych.modules.operators.attention import causal_mask, ring_mask
from triptych.modules.operators.cache import dequantize_rows, is_one, quantize_rows, ring_slot, ring_source


@dataclass(frozen=True)
class LegalizeExecuTorch(GraphPass):
    """Speak ExecuTorch's custom operators (schemas in ``extension/llm/custom_ops`` and ``kernels/quantized``).

    1. ``triptych::update_cache`` → ``llama::update_cache``.
    2. ``triptych::cached_sdpa`` → ``llama::custom_sdpa`` with ``is_causal``. With a window or a mask [S, max] it gets a
       float32 mask and all slots; it then ignores the start position.
    3. ``triptych::ring_sdpa`` → ``llama::custom_sdpa`` with a mask over the ring and the fresh keys side by side. The
       writes that follow take rows by gather, and ExecuTorch puts them in place at the end of the method. At one
       position the order turns round: the fresh key is written first, by ``llama::update_cache``, and every slot filled
       so far is seen, without a mask or a copy.
    4. ``triptych::update_quantized_cache`` → the rounding, and ``llama::update_cache`` of integers and scales.
       ``triptych::quantized_cached_sdpa`` → the slots in use as floats, and ``llama::custom_sdpa``.
       ``llama::custom_quantized_sdpa`` is left alone: it wants int8 queries, and took eight to ten times as long.
    5. ``triptych::quantized_embedding`` → ``quantized_decomposed::embedding_byte`` or ``embedding_4bit``.
    6. What these kernels cannot do (a soft cap, values wider than keys, masks by head) is spelled out in aten.
    7. Start positions are read, and masks made, once a method.
    8. ``aten.embedding`` loses its padding index, which only gradients see: ExecuTorch recognizes a quantized
       embedding by its bare form.
    """

    name: ClassVar[str] = "legalize-executorch"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Replace every neutral operator call."""
        register_llama_operators()
        legalizer = _Legalizer(editor)
        for node in list(editor.graph.nodes):
            if node in legalizer.replaced:
                continue
            if node.target in legalizer.rules:
                if log.match(node):
                    legalizer.rules[node.target](node, arguments(node))
            elif node.target is torch.ops.aten.embedding.default and len(node.args) > 2 and log.match(node):
                node.args = node.args[:2]


def arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by their names in the operator's schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {**dict(zip((one.name for one in schema), node.args, strict=False)), **node.kwargs}
    return {one.name: given.get(one.name, one.default_value) for one in schema}


def shape_of(node: Node) -> torch.Size:
    """Return the shape of a node's value; dynamic sizes are symbolic."""
    shape: torch.Size = node.meta["val"].shape
    return shape


class _Legalizer:
    """The rules over one method. `replaced` are nodes that went with another's rule."""

    def __init__(self, editor: GraphEditor) -> None:
        operators = torch.ops.triptych
        self.editor = editor
        self.replaced: set[Node] = set()
        self.rules: dict[Any, Callable[[Node, dict[str, Any]], None]] = {
            operators.update_cache.default: self._update_cache,
            operators.cached_sdpa.default: self._cached_sdpa,
            operators.update_ring_cache.default: self._update_ring_cache,
            operators.ring_sdpa.default: self._ring_sdpa,
            operators.update_quantized_cache.default: self._update_quantized_cache,
            operators.quantized_cached_sdpa.default: self._quantized_cached_sdpa,
            operators.quantized_embedding.default: self._quantized_embedding,
        }
        self._made: dict[Hashable, Any] = {}

    # ------------------------------------------------------------------------------------------------ static caches

    def _update_cache(self, node: Node, given: dict[str, Any]) -> None:
        start = self._start(given["start_pos"], given["cache"])
        self._write(node, given["cache"], given["value"], start)
        self._erase(node)

    def _cached_sdpa(self, node: Node, given: dict[str, Any]) -> None:
        query, key, mask = given["query"], given["key"], given["attn_mask"]
        if not _kernel_takes(given["softcap"], key, given["value"]) or (mask is not None and not _is_table(mask)):
            self._spell_out(node)
            return
        if given["window"] is not None:
            mask = self._window_mask(node, query, given["start_pos"], shape_of(key)[1], given["window"])
        elif mask is not None:
            mask = self._once(("mask", mask), node, _as_addend, mask)
        start = 0 if mask is not None else self._start(given["start_pos"], key)
        self._attend(node, query, key, given["value"], start, mask, given["scale"])

    def _window_mask(self, node: Node, query: Node, start_pos: Node, slots: int, window: int) -> Node:
        def mask(fresh: Tensor, start: Tensor) -> Tensor:
            return _as_addend(causal_mask(start, fresh.shape[1], slots, window))

        key = ("window", start_pos, str(shape_of(query)[1]), str(slots), window)
        made: Node = self._once(key, node, mask, query, start_pos)
        return made

    # ------------------------------------------------------------------------------------------------ rings

    def _ring_sdpa(self, node: Node, given: dict[str, Any]) -> None:
        query, start_pos, sink = given["query"], given["start_pos"], given["sink"]
        if not _kernel_takes(given["softcap"], given["key"], given["value"]):
            self._spell_out(node)
            return
        slots = shape_of(given["ring_keys"])[1]
        writes = self._writes_after(given)
        if _is_one(query) and writes is not None:
            slot_key, last_key = ("slot", start_pos, slots, sink), ("last", start_pos, slots)
            slot = self._scalar(slot_key, lambda at: ring_slot(at, slots, sink), start_pos, slots)
            last = self._scalar(last_key, lambda at: at.clamp_max(slots - 1), start_pos, slots)
            for part, write in zip(("key", "value"), writes, strict=True):
                self._write(node, given[f"ring_{part}s"], given[part], slot)
                self._erase(write)
            self._attend(node, query, given["ring_keys"], given["ring_values"], last, None, given["scale"])
            return

        def mask(fresh: Tensor, start: Tensor) -> Tensor:
            return _as_addend(ring_mask(start, fresh.shape[1], slots, sink))

        key = ("ring", start_pos, str(shape_of(query)[1]), slots, sink)
        made = self._once(key, node, mask, query, start_pos)
        with self.editor.graph.inserting_before(node):
            keys, values = (
                self.editor.call(torch.ops.aten.cat.default, [given[f"ring_{part}s"], given[part]], 1, like=node)
                for part in ("key", "value")
            )
        self._attend(node, query, keys, values, 0, made, given["scale"])

    def _writes_after(self, given: dict[str, Any]) -> list[Node] | None:
        """Return the writes of the fresh keys and values that one attention over a ring saw, or None."""
        found = []
        for part in ("key", "value"):
            ring = given[f"ring_{part}s"]
            wanted = {"cache": ring, "value": given[part], "start_pos": given["start_pos"], "sink": given["sink"]}
            users = [user for user in ring.users if user.target is torch.ops.triptych.update_ring_cache.default]
            if len(users) != 1 or arguments(users[0]) != wanted:
                return None
            found += users
        return found

    def _update_ring_cache(self, node: Node, given: dict[str, Any]) -> None:
        cache, value, start_pos, sink = given["cache"], given["value"], given["start_pos"], given["sink"]
        if _is_one(value):
            self._spell_out(node)
            return
        slots = shape_of(cache)[1]

        def source(fresh: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
            index, written = ring_source(start, fresh.shape[1], slots, sink)
            return index, written.reshape(1, -1, 1, 1)

        key = ("source", start_pos, str(shape_of(value)[1]), slots, sink)
        index, written = self._once(key, node, source, value, start_pos)
        aten, call = torch.ops.aten, self.editor.call
        with self.editor.graph.inserting_before(node):
            rows = call(aten.index_select.default, value, 1, index, like=node)
            kept = call(aten.where.self, written, rows, cache, like=node)
            call(aten.copy_.default, cache, kept, like=node)
        self._erase(node)

    # ------------------------------------------------------------------------------------------------ int8

    def _update_quantized_cache(self, node: Node, given: dict[str, Any]) -> None:
        start = self._start(given["start_pos"], given["cache"])
        quantized, scales = self._traced(node, quantize_rows, given["value"])
        self._write(node, given["cache"], quantized, start)
        self._write(node, given["scales"], scales, start)
        self._erase(node)

    def _quantized_cached_sdpa(self, node: Node, given: dict[str, Any]) -> None:
        query, key, value = given["query"], given["key"], given["value"]
        if not _kernel_takes(given["softcap"], key, value):
            self._spell_out(node)
            return
        mask: Node | None = None
        if given["window"] is not None:
            mask = self._window_mask(node, query, given["start_pos"], shape_of(key)[1], given["window"])
        start = 0 if mask is not None else self._start(given["start_pos"], key)
        end = shape_of(key)[1] if mask is not None else self._end(node, query, start)
        dtype = query.meta["val"].dtype

        def in_use(row: Tensor, scales: Tensor, slots: int) -> Tensor:
            return dequantize_rows(row.narrow(1, 0, slots), scales.narrow(1, 0, slots), dtype)

        keys = self._traced(node, in_use, key, given["key_scales"], end)
        values = self._traced(node, in_use, value, given["value_scales"], end)
        self._attend(node, query, keys, values, start, mask, given["scale"])

    def _quantized_embedding(self, node: Node, given: dict[str, Any]) -> None:
        weight, operators = given["weight"], torch.ops.quantized_decomposed
        is_byte = weight.meta["val"].dtype == torch.int8
        target = operators.embedding_byte.default if is_byte else operators.embedding_4bit.default
        bounds = (-128, 127) if is_byte else (-8, 7)
        with self.editor.graph.inserting_before(node):
            rows = self.editor.call(target, weight, given["scales"], None, *bounds, given["indices"], like=node)
        node.replace_all_uses_with(rows)
        self._erase(node)

    # ------------------------------------------------------------------------------------------------ parts

    def _attend(
        self, node: Node, query: Node, keys: Node, values: Node, start: Any, mask: Node | None, scale: float | None
    ) -> None:
        options = () if scale is None else (scale,)
        with self.editor.graph.inserting_before(node):
            attended = self.editor.call(
                torch.ops.llama.custom_sdpa.default,
                *(query, keys, values, start, mask, 0.0, mask is None, *options),
                like=node,
            )
        node.replace_all_uses_with(attended)
        self._erase(node)

    def _write(self, node: Node, cache: Node, value: Node, start: Node | int) -> None:
        with self.editor.graph.inserting_before(node):
            self.editor.call(torch.ops.llama.update_cache.default, value, cache, start, like=node)

    def _spell_out(self, node: Node) -> None:
        self.editor.inline(node, REFERENCE_KERNELS[node.target])

    def _erase(self, node: Node) -> None:
        self.editor.graph.erase_node(node)
        self.replaced.add(node)

    def _traced(self, node: Node, function: Callable[..., Any], *inputs: Node | int) -> Any:
        """Put the traced body of `function` before `node` and return its results."""
        traced = self.editor.trace(function, inputs, {})
        with self.editor.graph.inserting_before(node):
            return self.editor.paste(traced, like=node)

    def _once(self, key: Hashable, node: Node, function: Callable[..., Any], *inputs: Node | int) -> Any:
        """Do so where the method does not have it yet; nodes are visited in order, so it stands before every user."""
        if key not in self._made:
            self._made[key] = self._traced(node, function, *inputs)
        return self._made[key]

    def _start(self, start_pos: Node, rows: Node) -> Node | int:
        if is_first_position(start_pos):
            return 0
        slots = shape_of(rows)[1]
        return self._scalar(("start", start_pos, slots), None, start_pos, slots)

    def _scalar(self, key: Hashable, function: Callable[[Tensor], Tensor] | None, start_pos: Node, bound: int) -> Node:
        """Return the one element of ``function(start_pos)`` as an integer below `bound`."""
        if key not in self._made:
            editor = self.editor
            before = (editor.last_placeholder if start_pos.op == "placeholder" else start_pos).next
            tensor = start_pos if function is None else self._traced_at(before, function, start_pos)
            with editor.graph.inserting_before(before):
                element = editor.call(torch.ops.aten.select.int, tensor, 0, 0)
                value = editor.call(torch.ops.aten.item.default, element)
                editor.call(torch.ops.aten.sym_constrain_range_for_size.default, value, min=0, max=bound - 1)
            self._made[key] = value
        made: Node = self._made[key]
        return made

    def _end(self, node: Node, query: Node, start: Node | int) -> Any:
        """Return the number of slots in use once the fresh positions are written."""

        def end(fresh: Tensor, first: int) -> int:
            return first + fresh.shape[1]

        return self._once(("end", start, str(shape_of(query)[1])), node, end, query, start)

    def _traced_at(self, before: Node, function: Callable[..., Any], start_pos: Node) -> Node:
        traced = self.editor.trace(function, (start_pos,), {})
        with self.editor.graph.inserting_before(before):
            made: Node = self.editor.paste(traced, like=start_pos)
        return made


def _kernel_takes(softcap: float | None, key: Node, value: Node) -> bool:
    return softcap is None and shape_of(key)[3] == shape_of(value)[3]


def _is_table(mask: Node) -> bool:
    return mask.meta["val"].dim() == 2 and mask.meta["val"].dtype in (torch.bool, torch.float32)


def _is_one(fresh: Node) -> bool:
    return is_one(shape_of(fresh)[1])


def _as_addend(mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask
