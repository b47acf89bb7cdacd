"""Order for passes that come without one.

What must stand before what is a graph: names in `after` and `before`, properties (whoever ensures one comes before
whoever requires it), and kinds (what changes the module comes before what changes the captured program). Where these
leave a choice, passes keep the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import networkx

from triptych.compiler.pass_kinds import Pass, SourceTransform
from triptych.compiler.pipeline import Pipeline, build
from triptych.errors import PipelineError


def schedule(passes: Iterable[Pass]) -> Pipeline:
    """Return `passes` in an order that their declarations allow, with capture where a captured program is needed.

    A pass that ensures a property and requires it too keeps it up and provides it for nobody. Raises
    `PipelineError` for declarations that contradict each other, edge by edge, and for a property that no pass
    provides.
    """
    given = list(passes)
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from(range(len(given)))
    for first, second, reason in _constraints(given):
        if not graph.has_edge(first, second):
            graph.add_edge(first, second, reason=reason)
    try:
        order = list(networkx.lexicographical_topological_sort(graph, key=lambda index: index))
    except networkx.NetworkXUnfeasible:
        raise PipelineError(_explained(graph, given)) from None
    ordered = [given[index] for index in order]
    source = [one for one in ordered if isinstance(one, SourceTransform)]
    program = [one for one in ordered if not isinstance(one, SourceTransform)]
    return build([*source, None, *program] if program else source).checked()


def _constraints(passes: Sequence[Pass]) -> Iterator[tuple[int, int, str]]:
    """Yield (first, second, why): the pass at `first` comes before the one at `second`."""
    for index, one in enumerate(passes):
        others = [(number, other) for number, other in enumerate(passes) if number != index]
        for number, other in others:
            if other.name in one.after:
                yield number, index, f"{one.name}.after"
            if other.name in one.before:
                yield index, number, f"{one.name}.before"
            if isinstance(one, SourceTransform) and not isinstance(other, SourceTransform):
                yield index, number, f"{one.name} changes the module, {other.name} the captured program"
        for required in sorted(one.requires, key=str):
            providers = [
                number for number, other in others if required in other.ensures and required not in other.requires
            ]
            if not providers:
                raise PipelineError(
                    f"{one.name} requires {required}, which none of the passes ensures; add one that does"
                )
            for number in providers:
                yield number, index, f"ensures {required}, which {one.name} requires"


def _explained(graph: networkx.DiGraph[int], passes: Sequence[Pass]) -> str:
    """Say edge by edge why one cycle of `graph` is one."""
    steps = [
        f"{passes[first].name} {'must come ' if number == 0 else ''}before {passes[second].name} "
        f"({graph.edges[first, second]['reason']})"
        for number, (first, second) in enumerate(networkx.find_cycle(graph))
    ]
    return f"the passes have no order: {', '.join(steps)}; leave one out or change what it declares"
