"""``split-prefill-first-chunk``: a prefill of its own for the beginning of a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch.fx import Node

from triptych.compiler.capture import output_signatures
from triptych.compiler.compose import compose
from triptych.compiler.editing import GraphEditor
from triptych.compiler.first_position import START_POS, first_position
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Method, Program
from triptych.compiler.properties import KV_CACHE, Property
from triptych.compiler.roles import PREFILL_FIRST
from triptych.manifest import ABI, TensorSignature

METHOD: Final = "prefill_first"


@dataclass(frozen=True)
class SplitPrefillFirstChunk(ProgramPass):
    """Attend to fresh keys and values alone where there is no past.

    1. A method ``prefill_first``, with the role of that name, stands beside the method with the role prefill. It
       takes the same inputs but for `start_pos`, which is 0 in it, and shares every weight and the caches.
    2. In it every ``triptych::cached_sdpa`` over rows that ``triptych::update_cache`` has just filled attends to the
       keys and values that were written: plain causal attention over S positions, in place of all slots of the cache.
       The cache is still written.
    3. ``triptych::ring_sdpa`` without sinks becomes ``triptych::cached_sdpa`` over the fresh keys with its window.
    4. Attention with a mask of its own, over rows that something else writes too, over quantized rows or with sinks
       keeps reading the cache, which is right at position 0 too.

    A runner calls the new method exactly where a prefill begins at position 0, and the other one everywhere else. One
    that knows of no such role goes on as before.
    """

    name: ClassVar[str] = "split-prefill-first-chunk"
    requires: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})
    after: ClassVar[frozenset[str]] = frozenset({"last-token-logits", "merge-token-embedding"})

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Return the program with the new method, if any attention in it becomes cheaper."""
        found = list(program.methods_with("prefill"))
        if len(found) != 1 or METHOD in program.methods:
            count = f"{len(found)} methods have the role prefill; expected one"
            log.refused("the program", f"it has a method {METHOD}" if METHOD in program.methods else count)
            return program
        if program.metadata.abi != ABI:
            log.refused("the program", f"it keeps the ABI {program.metadata.abi}, which has no such method")
            return program
        ((name, prefill),) = found
        if not any(port.name == START_POS for port in prefill.inputs):
            log.refused(name, f"it takes no {START_POS}")
            return program
        first = compose(first_position(self.name), prefill, {START_POS: START_POS})
        editor = GraphEditor(first.exported, self.name)
        operators = torch.ops.triptych
        kinds = (operators.cached_sdpa.default, operators.ring_sdpa.default, operators.quantized_cached_sdpa.default)
        matched = False
        for node in editor.calls(*kinds):
            changed = _over_fresh(node)
            if isinstance(changed, str):
                log.refused(node, changed)
            elif log.match(node):
                _replace(editor, node, changed)
                matched = True
        if not matched:
            if not any(True for _ in editor.calls(*kinds)):
                log.refused(name, "no operator in it is attention over a cache; put swap-sdpa before capture")
            return program
        exported = editor.finish()
        method = dataclasses.replace(
            first,
            exported=exported,
            roles=frozenset({PREFILL_FIRST}),
            outputs=output_signatures(exported, first.outputs, first.inputs),
        )
        return program.with_methods(_with_links({**program.methods, METHOD: method}, name))


def _over_fresh(node: Node) -> dict[str, Any] | str:
    """Return the arguments of the same attention over fresh keys and values, or why it must read the cache."""
    given = _arguments(node)
    if node.target is torch.ops.triptych.quantized_cached_sdpa.default:
        return "it reads quantized rows, and fresh ones are not"
    if node.target is torch.ops.triptych.ring_sdpa.default:
        return _over_fresh_window(given)
    if given["attn_mask"] is not None:
        return "its mask speaks of the slots of the cache"
    fresh = [_written(given[part], given["start_pos"], node) for part in ("key", "value")]
    reasons = [one for one in fresh if isinstance(one, str)]
    if reasons:
        return reasons[0]
    return {**given, "key": fresh[0], "value": fresh[1]}


def _over_fresh_window(given: Mapping[str, Any]) -> dict[str, Any] | str:
    """A ring is empty at position 0; what is left is the window over the fresh positions."""
    if given["sink"]:
        return "it has sinks, which no window shows"
    window = int(given["ring_keys"].meta["val"].shape[1])
    kept = {name: given[name] for name in ("query", "key", "value", "start_pos", "scale", "softcap")}
    return {**kept, "window": window, "attn_mask": None}


def _written(row: Node, start_pos: Node, reader: Node) -> Node | str:
    """Return what one plain write before `reader` puts into `row` at the same position, or why that is not known."""
    writes = [user for user in row.users if user is not reader and _writes(user, row)]
    if row.op != "placeholder":
        return f"{row.name} is no row of a cache"
    if len(writes) != 1 or writes[0].target is not torch.ops.triptych.update_cache.default:
        return f"{row.name} is not written by one update_cache alone"
    given = _arguments(writes[0])
    order = {node: index for index, node in enumerate(row.graph.nodes)}
    if given["start_pos"] is not start_pos or order[writes[0]] > order[reader]:
        return f"{row.name} is written at another position, or after it was read"
    value: Node = given["value"]
    return value


def _writes(user: Node, row: Node) -> bool:
    """True unless `user` is known to read `row` and give no view of it."""
    if not isinstance(user.target, torch._ops.OpOverload):
        return True
    schema, given = user.target._schema, _arguments(user)
    return any(one.alias_info is not None and given[one.name] is row for one in schema.arguments)


def _replace(editor: GraphEditor, node: Node, given: dict[str, Any]) -> None:
    target = torch.ops.triptych.cached_sdpa.default
    schema = [one for one in target._schema.arguments if given[one.name] is not None]
    values = [given[one.name] for one in schema if not one.kwarg_only]
    named = {one.name: given[one.name] for one in schema if one.kwarg_only}
    with editor.graph.inserting_before(node):
        attended = editor.call(target, *values, like=node, **named)
    node.replace_all_uses_with(attended)
    editor.graph.erase_node(node)


def _arguments(node: Node) -> dict[str, Any]:
    """Return the arguments of a call by their names in the operator's schema, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {**dict(zip((one.name for one in schema), node.args, strict=False)), **node.kwargs}
    return {one.name: given.get(one.name, one.default_value) for one in schema}


def _with_links(methods: dict[str, Method], prefill: str) -> dict[str, Method]:
    """Let whatever names an input of `prefill` as the taker of an output name that of the new method too."""

    def linked(port: TensorSignature) -> TensorSignature:
        taken = [link.removeprefix(f"{prefill}.") for link in port.links if link.startswith(f"{prefill}.")]
        links = (*port.links, *(f"{METHOD}.{name}" for name in taken))
        return dataclasses.replace(port, links=links) if taken else port

    changed = {}
    for name, method in methods.items():
        outputs = tuple(map(linked, method.outputs))
        changed[name] = method if outputs == method.outputs else dataclasses.replace(method, outputs=outputs)
    return changed
