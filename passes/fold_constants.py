"""``fold-constants``: what depends on weights and constants alone is computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from torch import Tensor
from torch.fx import Node

from triptych.compiler.aliasing import Aliases
from triptych.compiler.constants import Cone, constant_values, fold
from triptych.compiler.editing import GraphEditor, storage_identity
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method
from triptych.errors import PipelineError

SMALL: Final = 4096


@dataclass(frozen=True)
class FoldConstants(GraphPass):
    """Replace values that are the same in every call by weights that hold them.

    1. A value is constant where its operands are weights, literals and constants, and every operator on the way is
       deterministic and writes nothing. State, inputs and dynamic sizes are not constant; neither is memory that
       somebody writes in place.
    2. The last constant value on each way is stored, if it takes at most 4096 bytes, or at most `limit` times the
       bytes of the weights that it makes superfluous in the method; each weight is counted for one value. Where it
       is larger, the values that it is computed from are tried in its place.
    3. Views of weights stay: they cost nothing.
    4. Operators of torchao and of ``quantized_decomposed`` stay, whatever their size: targets recognize a quantized
       weight by them. Spelled out in aten, dequantized weights are larger than what they come from, so rule 2 holds.
    5. Methods that compute the same value from the same weights share it.
    """

    name: ClassVar[str] = "fold-constants"
    may_match_nothing: ClassVar[bool] = True

    limit: float = 1.0

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Store what fits, the last values first; raises `PipelineError` for a negative limit."""
        if self.limit < 0:
            raise PipelineError(f"fold-constants: limit is {self.limit}; give a factor of 0 or more")
        plan = _Plan(editor, self.limit)
        for node, reason in plan.refused.items():
            log.refused(node, reason)
        for node in plan.chosen:
            if log.match(node):
                fold(editor, node)


class _Plan:
    """What to store of the constant values of a method, decided from the last value to the first."""

    def __init__(self, editor: GraphEditor, limit: float) -> None:
        self._editor = editor
        self._limit = limit
        self._aliases = Aliases(editor)
        constants = constant_values(editor)
        self._constants = sorted(constants, reverse=True)
        self._counted: set[int] = set()
        self.chosen: list[Node] = []
        self.refused: dict[Node, str] = {}
        staying: set[Node] = set()
        for node in self._constants:
            if all(user in constants and user not in staying for user in node.users):
                continue
            cone = Cone.of(node)
            reason = self._reason(cone)
            if reason is None:
                self.chosen.insert(0, node)
            else:
                staying.add(node)
                if reason:
                    self.refused[node] = reason

    def _reason(self, cone: Cone) -> str | None:
        """Say why a value is not stored, in no words where there is nothing to gain; None where it is."""
        node, value = cone.node, cone.node.meta["val"]
        if not isinstance(value, Tensor) or any(isinstance(root, int) for root in self._aliases.of(node)):
            return ""
        if any(user.op == "output" for user in node.users):
            return "the caller receives it"
        if not value.is_contiguous():
            return "it repeats elements or has permuted axes, which a stored weight would not"
        freed = self._freed_by(cone)
        allowed = max(SMALL, self._limit * sum(freed.values()))
        if value.nbytes > allowed:
            return f"{value.nbytes} bytes would be stored in place of {sum(freed.values())}; limit is {self._limit:g}"
        self._counted.update(freed)
        return None

    def _freed_by(self, cone: Cone) -> dict[int, int]:
        """Return the bytes by storage that nobody would use with `cone` stored, beyond what is freed already."""
        roots = {cone.node, *self.chosen}
        dying: set[Node] = set()
        for node in self._constants:
            if node in roots or (node.users and all(user in dying for user in node.users)):
                dying.add(node)
        users: dict[int, set[Node]] = {}
        for one in self._editor.graph.find_nodes(op="placeholder"):
            if self._editor.is_weight(one):
                users.setdefault(storage_identity(self._editor.tensor(one)), set()).update(one.users)
        own = {storage_identity(self._editor.tensor(one)): self._editor.tensor(one).nbytes for one in cone.sources}
        return {one: size for one, size in own.items() if one not in self._counted and users[one] <= dying}
