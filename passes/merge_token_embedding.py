"""``merge-token-embedding``: methods that take embeddings of text take the tokens themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from triptych.compiler.compose import compose
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Method, Program


@dataclass(frozen=True)
class MergeTokenEmbedding(ProgramPass):
    """Look tokens up in the method that needs their embeddings, in place of a call before it.

    1. A method with an input that comes from the method with the role token_embedding, such as prefill, takes
       ``tokens`` in its place. Both share the table as before.
    2. The token embedding goes away once no method takes what it gives.
    3. A method whose input comes from an encoder too must keep taking embeddings, which pictures have and tokens are
       not; it is refused.
    """

    name: ClassVar[str] = "merge-token-embedding"

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Compose the token embedding with each method that it alone feeds."""
        names = [name for name, _ in program.methods_with("token_embedding")]
        if len(names) != 1:
            log.refused("the program", f"{len(names)} methods have the role token_embedding; expected one")
            return program
        (name,) = names
        embedding = program.methods[name]
        methods = dict(program.methods)
        for taker, method in program.methods.items():
            ports = _fed_ports(name, method)
            others = [link for port in method.inputs if port.name in ports.values() for link in port.links]
            others = [link for link in others if not link.startswith(f"{name}.")]
            if not ports:
                continue
            if others:
                taken = ", ".join(ports.values())
                log.refused(taker, f"its {taken} come from {', '.join(others)} too, so it must keep taking embeddings")
            elif log.match(taker):
                methods[taker] = compose(embedding, method, ports)
        if not any(_fed_ports(name, method) for method in methods.values()):
            del methods[name]
        elif methods[name] is embedding:
            methods[name] = _without_links(embedding, name, methods)
        return program.with_methods(methods) if log.matches else program


def _fed_ports(producer: str, method: Method) -> dict[str, str]:
    """Return output of `producer` → input of `method` that takes it."""
    return {
        link.removeprefix(f"{producer}."): port.name
        for port in method.inputs
        for link in port.links
        if link.startswith(f"{producer}.")
    }


def _without_links(embedding: Method, name: str, methods: Mapping[str, Method]) -> Method:
    """Return the token embedding with links to those methods only that still take what it gives."""
    outputs = tuple(
        dataclasses.replace(
            port,
            links=tuple(
                link
                for link in port.links
                if (taker := link.partition(".")[0]) not in methods or _fed_ports(name, methods[taker])
            ),
        )
        for port in embedding.outputs
    )
    return embedding if outputs == embedding.outputs else dataclasses.replace(embedding, outputs=outputs)
