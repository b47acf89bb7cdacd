"""``greedy-token``: decode gives the most likely token in place of the logits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch

from triptych.compiler.capture import output_signatures
from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Method, Program
from triptych.manifest import CHOSEN_TOKEN


@dataclass(frozen=True)
class GreedyToken(ProgramPass):
    """Choose the token in the graph, so that nothing as long as the vocabulary leaves it at each step.

    1. A method with the role decode returns ``token`` int64 [1, 1], the id of the largest of its last logits, in place
       of ``logits``. It is what the next call takes as ``tokens``.
    2. Prefill keeps its logits: they give the first token, and they are what shows that the program reacts to its
       inputs. So a method that serves prefill too is refused.

    What the pass makes can only be decoded greedily; other sampling needs the logits.
    """

    name: ClassVar[str] = "greedy-token"
    after: ClassVar[frozenset[str]] = frozenset({"last-token-logits", "adopt-abi"})

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Return the program with decode methods that choose."""
        changed = {}
        for name, method in program.methods_with("decode"):
            index = next((i for i, port in enumerate(method.outputs) if port.name == "logits"), None)
            others = sorted({role.kind for role in method.roles} - {"decode"})
            if index is None:
                log.refused(name, "no output is called logits")
            elif others:
                log.refused(name, f"it has the role {', '.join(others)} too, whose logits are needed")
            elif not any(True for _ in program.methods_with("prefill")):
                log.refused(name, "no method with the role prefill would be left that gives logits")
            elif log.match(name):
                changed[name] = _choosing(method, index, self.name)
        return program.with_methods({**program.methods, **changed}) if changed else program


def _choosing(method: Method, index: int, made_by: str) -> Method:
    editor = GraphEditor(method.exported, made_by)
    logits = editor.user_outputs[index]
    with editor.graph.inserting_before(editor.graph.output_node()):
        row = logits
        if row.meta["val"].dim() == 3:  # [1, S, V]
            row = editor.call(torch.ops.aten.select.int, row, 1, -1, like=logits)
        token = editor.call(torch.ops.aten.argmax.default, row, -1, True, like=logits)
    editor.replace_user_output(index, token)
    exported = editor.finish()
    ports = list(method.outputs)
    ports[index] = dataclasses.replace(ports[index], name=CHOSEN_TOKEN)
    return dataclasses.replace(
        method, exported=exported, outputs=output_signatures(exported, tuple(ports), method.inputs)
    )
