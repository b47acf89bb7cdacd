"""``remove-dead-methods``: methods that generation does not need go away, with their weights and state."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Final

from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Method, Program
from triptych.errors import PipelineError

GENERATION: Final = ("prefill", "prefill_first", "decode")
SEPARATOR: Final = "+"


@dataclass(frozen=True)
class RemoveDeadMethods(ProgramPass):
    """Keep the methods that generation calls, or those named, and what these depend on.

    1. Without `keep`, methods with role prefill, prefill_first or decode are wanted; with it, those it names, joined
       by "+": ``remove-dead-methods{keep=prefill+decode+score}``.
    2. What feeds a method that is kept is kept: the token embedding, encoders.
    3. So is whoever alone writes state that a kept method reads, such as an encoder that fills the keys of
       cross-attention. A row that other kept methods write too needs no further writer.
    4. The last decode stays, whatever `keep` says. So does a method that alone reads state which a kept method
       writes: the writes would serve nobody.
    5. Links to removed methods leave the signatures; without an encoder of images the program takes no images.
    """

    name: ClassVar[str] = "remove-dead-methods"
    may_match_nothing: ClassVar[bool] = True
    # One method may be the reason for which another stays.
    indivisible: ClassVar[bool] = True

    keep: str = ""

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Drop the methods nobody needs; raises `PipelineError` for a name in `keep` that no method has."""
        wanted = self._wanted(program)
        if not wanted:
            log.refused("the program", "no method has a role of generation; name in keep what is wanted")
            return program
        kept = _needed(program, wanted)
        if not any(_has_role(method, "decode") for name, method in program.methods.items() if name in kept):
            for name, _ in list(program.methods_with("decode"))[:1]:
                log.refused(name, "it is the last method with role decode, which generation cannot do without")
                kept = _needed(program, {*kept, name})
        kept = _with_readers(program, kept, log)
        removed = {name for name in program.methods if name not in kept and log.match(name)}
        if not removed:
            return program
        methods = {
            name: _without_links(method, removed) for name, method in program.methods.items() if name not in removed
        }
        metadata = program.metadata
        if not any(role.modality == "image" for method in methods.values() for role in method.roles):
            metadata = dataclasses.replace(metadata, image=None)
        return Program.build(methods, metadata)

    def _wanted(self, program: Program) -> set[str]:
        if not self.keep:
            return {name for name, method in program.methods.items() if any(_has_role(method, r) for r in GENERATION)}
        names = self.keep.split(SEPARATOR)
        for name in names:
            if name not in program.methods:
                raise PipelineError(
                    f"remove-dead-methods: keep names {name!r}, which is no method; the program has "
                    f"{', '.join(program.methods)}"
                )
        return set(names)


def _has_role(method: Method, kind: str) -> bool:
    return any(role.kind == kind for role in method.roles)


def _needed(program: Program, wanted: Collection[str]) -> set[str]:
    """Return `wanted` and what these methods depend on, by values and by state."""
    needed, waiting = set(wanted), list(wanted)
    while waiting:
        for producer, _, kind in program.graph.in_edges(f"method:{waiting.pop()}", data="kind"):
            name = producer.removeprefix("method:")
            if kind == "feeds" and name not in needed:
                needed.add(name)
                waiting.append(name)
        if not waiting:
            waiting = [
                name
                for row in program.state.values()
                if needed & set(row.readers) and not needed & set(row.writers)
                for name in row.writers
            ]
            needed |= set(waiting)
    return needed


def _with_readers(program: Program, kept: set[str], log: MatchLog) -> set[str]:
    """Return `kept` and the methods that alone read state which these write."""
    while True:
        orphan = next(
            (row for row in program.state.values() if kept & set(row.writers) and not kept & set(row.readers)), None
        )
        if orphan is None or not orphan.readers:
            return kept
        writer = min(kept & set(orphan.writers))
        for name in orphan.readers:
            log.refused(name, f"it reads the state {orphan.name}, which {writer} writes and no other kept method reads")
        kept = _needed(program, kept | set(orphan.readers))


def _without_links(method: Method, removed: Collection[str]) -> Method:
    def kept(links: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(link for link in links if link.partition(".")[0] not in removed)

    inputs = tuple(dataclasses.replace(port, links=kept(port.links)) for port in method.inputs)
    outputs = tuple(dataclasses.replace(port, links=kept(port.links)) for port in method.outputs)
    return dataclasses.replace(method, inputs=inputs, outputs=outputs)
