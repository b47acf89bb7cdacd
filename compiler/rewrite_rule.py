"""`RewriteRule`: a graph pass written as a pattern, a check and a replacement.

`pattern` and `replacement` are ordinary methods with the same parameters. The first is traced into operators to look
for; the second into operators to put in their place, over the values that the parameters were bound to. What makes a
rewrite sound is checked here, at every place, and where it is not, the place is left alone with the reason.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import _ShapeEnvGuardError, statically_known_true

from triptych.compiler.aliasing import Aliases, Region, is_writer, out_of_order, seen_differently
from triptych.compiler.editing import GraphEditor, Traced, replace_results
from triptych.compiler.matching import Bound, Failure, Matcher, calls, shown
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.pattern import Pattern, trace_pattern
from triptych.compiler.program import Method
from triptych.errors import VerificationError


@dataclass(frozen=True)
class RuleMatch(Region):
    """A place where the pattern fits: ``match["x"]`` is what the parameter x is bound to.

    That is a node for a tensor or a symbolic integer, the Python value for a literal, and a list for ``*rest``.
    `editor` holds the graph, and knows the tensors that weights stand for (`editor.tensor`).
    """

    arguments: Mapping[str, Any]
    editor: GraphEditor

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def value(self, name: str) -> Any:
        """Return the fake value of what `name` is bound to, with its shape, dtype and device; literals as they are."""
        return torch.fx.map_arg(self.arguments[name], lambda node: node.meta["val"])


class RewriteRule(GraphPass):
    """Rewrites every place of a method's graph that looks like `pattern`.

    1. Parameters of `pattern` are wildcards of the kind they are annotated with; one that is used twice stands for one
       value, and ``*rest`` within a list for the items that remain. Literals are compared by value, defaults are
       spelled out, operands of commutative operators fit in both orders.
    2. `pattern` may return several results; places are looked for by the first, in graph order, in one sweep.
    3. A place is left alone where `check` objects, where a value within is used elsewhere too (unless
       `interior_may_be_shared`), where it overlaps with an earlier one, or where an in-place write would be seen
       differently.
    4. `replacement` is traced over the values bound; what it returns must have the shape and dtype of what it replaces.
    """

    interior_may_be_shared: ClassVar[bool] = False

    @abstractmethod
    def pattern(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is looked for, in operators (``torch.ops.aten.…``) over the parameters.

        Parameters are ordinary and annotated: ``def pattern(self, x: Tensor, eps: float) -> Tensor``.
        """

    def check(self, match: RuleMatch) -> str | None:
        """Return why `match` is left alone, or None where it may be rewritten."""
        return None

    @abstractmethod
    def replacement(self, *args: Any, **kwargs: Any) -> Any:
        """Return what takes the place of the results, in any torch code; same parameters as `pattern`."""

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Rewrite every place where `log` allows it."""
        for _ in sweep(self, editor, log):
            pass


@lru_cache(maxsize=256)
def traced_pattern(rule: RewriteRule) -> Pattern:
    """Return the pattern of `rule`; raises `VerificationError` for what a pattern cannot hold."""
    parameters = [list(inspect.signature(one).parameters) for one in (rule.pattern, rule.replacement)]
    if parameters[0] != parameters[1]:
        raise VerificationError(
            f"rule {rule.name}: its replacement takes ({', '.join(parameters[1])}), its pattern "
            f"({', '.join(parameters[0])}); give both the same parameters"
        )
    return trace_pattern(rule.pattern, rule.name)


@dataclass(frozen=True)
class Attempt:
    """What became of one node with the operator of the pattern's first result.

    `reason` is None for a match, else why the place is left alone; `matched` lists the operators that fitted, as
    (pattern's, graph's node).
    """

    anchor: Node
    reason: str | None
    matched: tuple[tuple[Node, Node], ...]


def sweep(rule: RewriteRule, editor: GraphEditor, log: MatchLog) -> Iterator[Attempt]:
    """Try `rule` at every candidate of the graph in order, rewriting where `log` allows it; yield what became of each.

    Raises `VerificationError` for a replacement that cannot be traced, or whose result does not fit.
    """
    return _Sweep(rule, editor, log).run()


@dataclass(frozen=True)
class _Plan:
    """A sound rewrite: the nodes that go, the node before which the replacement comes, and the replacement."""

    match: RuleMatch
    leaving: frozenset[Node]
    place: Node
    traced: Traced


class _Sweep:
    def __init__(self, rule: RewriteRule, editor: GraphEditor, log: MatchLog) -> None:
        self.rule = rule
        self.editor = editor
        self.log = log
        self.pattern = traced_pattern(rule)
        self.aliases = Aliases(editor)
        self.nodes = list(editor.graph.nodes)
        self.writers = [node for node in self.nodes if is_writer(node)]
        # Node that a match takes away or brings → the match's anchor. It takes part in no other, also where the match
        # is held back, so that the numbers of later matches do not depend on that.
        self.taken: dict[Node, Node] = {}

    def run(self) -> Iterator[Attempt]:
        matcher = Matcher(self.pattern, self.nodes, self._taken)
        for anchor in self.nodes:
            if anchor not in self.taken and calls(anchor, self.pattern.outputs[0].target):
                yield self._attempt(matcher, anchor)

    def _attempt(self, matcher: Matcher, anchor: Node) -> Attempt:
        failure: Failure | None = None
        for bound in matcher.match(anchor):
            matched = tuple((one, bound[one]) for one in self.pattern.calls)
            plan = self._plan(self._match(bound), matched)
            if isinstance(plan, _Plan):
                self._carry_out(anchor, plan)
                return Attempt(anchor, None, matched)
            failure = failure or Failure(plan, matched)
        failure = failure or matcher.failure
        assert failure is not None, "the matcher yields a match or says why there is none"
        self.log.refused(anchor, failure.reason)
        return Attempt(anchor, failure.reason, failure.matched)

    def _taken(self, node: Node) -> str | None:
        if node not in self.taken:
            return None
        return f"belongs to the overlapping match at %{self.taken[node].name}, which comes first in the graph"

    def _match(self, bound: Bound) -> RuleMatch:
        arguments = {
            one.name: list(bound[one.node]) if isinstance(bound[one.node], (tuple, list)) else bound[one.node]
            for one in self.pattern.parameters
        }
        inputs: dict[Node, None] = {}
        torch.fx.map_arg(arguments, inputs.setdefault)
        nodes = tuple(sorted({bound[one] for one in self.pattern.calls}))
        outputs = tuple(bound[one] for one in self.pattern.outputs)
        return RuleMatch(nodes, tuple(inputs), outputs, arguments, self.editor)

    def _plan(self, match: RuleMatch, matched: Sequence[tuple[Node, Node]]) -> _Plan | str:
        """Return how to rewrite `match`, or why not to."""
        reason = self.rule.check(match)
        if reason is None and not self.rule.interior_may_be_shared:
            reason = _shared(match)
        leaving = _leaving(match)
        place = _place(match, leaving) if reason is None else reason
        if isinstance(place, str):
            return place
        reason = out_of_order(match, [one for _, one in matched], self.writers, self.aliases)
        if reason is not None:
            return reason
        traced = self._trace(match)
        reason = seen_differently(match, leaving, place, traced, self.writers, self.aliases, self.editor)
        return _Plan(match, leaving, place, traced) if reason is None else reason

    def _trace(self, match: RuleMatch) -> Traced:
        """Trace the replacement over what is bound; its results are a tuple like the match's outputs."""
        args: list[Any] = []
        for one in self.pattern.parameters:
            args += match[one.name] if one.variadic else [] if one.keyword_only else [match[one.name]]
        kwargs = {one.name: match[one.name] for one in self.pattern.parameters if one.keyword_only}

        def results(*args: Any, **kwargs: Any) -> Any:
            result = self.rule.replacement(*args, **kwargs)
            return result if self.pattern.returns_tuple else (result,)

        environment = self.editor.fake_mode.shape_env
        try:
            # A frozen environment would settle a comparison of sizes by the example's, for every length.
            with torch.no_grad(), environment.error_on_new_guards() if environment else nullcontext():
                traced = self.editor.trace(results, args, kwargs)
        except _ShapeEnvGuardError as error:
            sizes = str(error).rpartition(": ")[2].rpartition(" == ")[0]
            raise self._error(match, f"the replacement decides by a dynamic size ({sizes})") from error
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise self._error(match, f"the replacement cannot be traced: {reason}") from error
        self._check_results(match, traced)
        return traced

    def _check_results(self, match: RuleMatch, traced: Traced) -> None:
        if any(inner.op == "get_attr" for inner in traced.graph.nodes):
            raise self._error(match, "the replacement makes a tensor of Python values; use an operator like torch.full")
        found = traced.results
        if not isinstance(found, (tuple, list)) or len(found) != len(match.outputs):
            count = len(found) if isinstance(found, (tuple, list)) else 1
            raise self._error(match, f"the replacement returns {count} results, the pattern {len(match.outputs)}")
        for node, result in zip(match.outputs, found, strict=True):
            old, new = node.meta.get("val"), _value(result)
            if not _agree(old, new):
                raise self._error(match, f"the replacement gives {_text(new)} where {_text(old)} stood")

    def _error(self, match: RuleMatch, message: str) -> VerificationError:
        return VerificationError(
            f"rule {self.rule.name} at {shown(match.outputs[0])}: {message}; rule author: mend the replacement, or "
            "refuse such a place in check",
            method=self.log.method,
            place=match.outputs[0].name,
        )

    def _carry_out(self, anchor: Node, plan: _Plan) -> None:
        """Ask whether the rewrite may be, and do it."""
        outputs = plan.match.outputs
        parts = [user for node in outputs if _has_parts(node) for user in node.users]
        self.taken |= dict.fromkeys([*plan.leaving, *parts], anchor)
        if not self.log.match(anchor):
            return
        previous = plan.place.prev
        with self.editor.graph.inserting_before(plan.place):
            results = self.editor.paste(plan.traced, like=anchor)
        brought = []
        while previous.next is not plan.place:
            previous = previous.next
            brought.append(previous)
        self.taken |= dict.fromkeys(brought, anchor)
        moved = [one for node, result in zip(outputs, results, strict=True) for one in _restrided(node, result)]
        for node, result in zip(outputs, results, strict=True):
            replace_results(node, result)
        for node in sorted(plan.leaving, reverse=True):
            self.editor.graph.erase_node(node)
        self.writers = sorted(
            [*(node for node in self.writers if node not in plan.leaving), *filter(is_writer, brought)]
        )
        self.aliases = Aliases(self.editor)
        if moved:
            self._refresh_after(plan.match, moved)

    def _refresh_after(self, match: RuleMatch, moved: Sequence[Node]) -> None:
        try:
            self.editor.refresh_after(*moved)
        except (RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise self._error(match, f"with the strides of the replacement, what follows fails: {reason}") from error


# ---------------------------------------------------------------------------------------------------- places


def _shared(match: RuleMatch) -> str | None:
    for node in match.nodes:
        for user in node.users if node not in match.outputs else ():
            if user.op == "output":
                return f"{shown(node)}, within the match, is also returned by the method"
            if user not in match.nodes:
                return f"{shown(node)}, within the match, is also used by {shown(user)}"
    return None


def _leaving(match: RuleMatch) -> frozenset[Node]:
    """The matched nodes that nobody needs after the rewrite."""
    leaving = set(match.outputs)
    for node in reversed(match.nodes):
        if node not in match.inputs and leaving.issuperset(node.users):
            leaving.add(node)
    return frozenset(leaving)


def _place(match: RuleMatch, leaving: frozenset[Node]) -> Node | str:
    """Return the node before which the replacement stands: after all inputs, before all users of the results.

    Where there is no such place, or where the matched nodes cannot go, return why.
    """
    for node in match.nodes:
        if node not in leaving and is_writer(node):
            return f"{shown(node)}, within the match, writes in place and has other users"
    place, output = match.nodes[-1], match.outputs[0]
    for node in match.outputs:
        if node in match.inputs:
            return f"{shown(node)} is a result of the match and an input of it"
        for user in node.users:
            if user not in leaving and user < place:
                place, output = user, node
    for node in match.inputs:
        if not node < place:
            return f"{shown(place)} uses the result {shown(output)} before the match's input {shown(node)} is there"
    return place


# ---------------------------------------------------------------------------------------------------- values


def _value(result: Any) -> Any:
    """The fake value of a result, a node or several in a tuple."""
    if isinstance(result, (tuple, list)):
        return [_value(one) for one in result]
    return result.meta["val"] if isinstance(result, Node) else result


def _has_parts(node: Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def _agree(old: Any, new: Any) -> bool:
    """True where two values have one shape, for every length, one dtype and one device."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return (old.dtype, old.device, old.dim()) == (new.dtype, new.device, new.dim()) and all(
            map(_agree, old.shape, new.shape)
        )
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return len(old) == len(new) and all(map(_agree, old, new))
    if isinstance(old, (int, torch.SymInt)) and isinstance(new, (int, torch.SymInt)):
        return statically_known_true(old == new)
    return old is None and new is None


def _restrided(node: Node, result: Any) -> list[Node]:
    """The nodes of `result` whose strides differ from those of `node`'s value."""
    olds, results = ([node.meta.get("val")], [result]) if not _has_parts(node) else (node.meta["val"], result)
    return [
        one
        for old, one in zip(olds, results, strict=True)
        if isinstance(old, Tensor) and not all(map(_agree, old.stride(), one.meta["val"].stride()))
    ]


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_text, value))})"
    return "nothing" if value is None else str(value)
