"""``remove-dead-code``: operators that no output and no state depends on go away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch._ops import OpOverload
from torch.fx import Node

from triptych.compiler.aliasing import Aliases, Root, is_writer
from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method


@dataclass(frozen=True)
class RemoveDeadCode(GraphPass):
    """Remove what a method computes for nobody, and with it the weights that nothing else uses.

    1. An operator goes where no output, no state and no assertion depends on its result. That holds for random
       operators too: dropout in evaluation is one of them by its schema.
    2. A write in place goes where it fills memory that the method itself allocated and nobody reads afterwards.
    3. Writes to state stay, whether or not this method reads them: another method, or the next call, may. State that
       no method reads at all is an error of the program, which capture reports.
    """

    name: ClassVar[str] = "remove-dead-code"
    may_match_nothing: ClassVar[bool] = True
    # Editing any part of a graph drops all that is plainly dead.
    indivisible: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Erase dead operators, last ones first."""
        for node in _dead(editor):
            if log.match(node):
                editor.graph.erase_node(node)


def _dead(editor: GraphEditor) -> list[Node]:
    """Return the dead calls, each before what it depends on."""
    aliases = Aliases(editor)
    read: set[Root] = set()
    living: set[Node] = set()
    dead: list[Node] = []
    # From the last node to the first, so that all that may still read a piece of memory has been seen.
    for node in reversed(list(editor.graph.nodes)):
        if any(user in living for user in node.users) or _has_effect(node, aliases, read):
            living.add(node)
            read |= aliases.of(*node.all_input_nodes)
        elif node.op == "call_function":
            dead.append(node)
    return dead


def _has_effect(node: Node, aliases: Aliases, read: set[Root]) -> bool:
    """True where `node` does more than give its result, given the memory that is read after it."""
    if node.op != "call_function":
        return node.op == "output"
    if not is_writer(node):
        is_random = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        return node.is_impure() and not is_random
    if not isinstance(node.target, OpOverload):
        return True
    return any(root in read or not _is_own(root) for root in aliases.written_by(node))


def _is_own(root: Root) -> bool:
    """True for memory that the method allocated for itself, as opposed to state, weights and inputs."""
    return isinstance(root, Node) and root.op == "call_function"
