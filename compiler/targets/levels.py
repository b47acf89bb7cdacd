"""Partitions that run one after another: one for each time a value comes back from outside the delegates.

ExecuTorch's own grouping tries every pair of partitions, which costs more with every layer, and can join two between
which a third one stands ("found dependency cycles"). Here a call's partition follows from its depth: the number of
times that a path to it enters a delegate. Depth never falls along a path, so no path leaves a partition and comes back,
and there are as few partitions as the longest path needs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

from torch.fx import Graph, Node

from triptych.errors import LoweringError


def levels(graph: Graph, groups: Iterable[Iterable[Node]]) -> Mapping[int, list[Node]]:
    """Return depth → the nodes of `groups` that run there, in the order of the graph.

    `groups` are disjoint sets of nodes that a delegate takes, each in one piece; parts of a node's result go with it,
    and constants with the group that names them. Raises `LoweringError` where two groups need each other's results.
    """
    nodes = list(graph.nodes)
    group_of: dict[Node, int] = {}
    for number, group in enumerate(groups):
        for node in group:
            group_of[node] = number
            group_of.update({user: number for user in node.users if user.target is operator.getitem})
    depths = dict.fromkeys(group_of.values(), 1)
    outside = dict.fromkeys(nodes, 0)

    def depth(node: Node) -> int:
        return depths[group_of[node]] if node in group_of else outside[node]

    settled = False
    while not settled:
        settled = True
        for node in nodes:
            if node.op in ("placeholder", "get_attr"):
                continue
            own = group_of.get(node)
            found = max((_through(one, group_of, depth(one), own) for one in node.all_input_nodes), default=0)
            if own is None:
                outside[node] = found
            elif found > depths[own]:
                depths[own] = found
                settled = False
        if max(depths.values(), default=0) > len(nodes):
            raise LoweringError("parts of the program that a delegate takes in one piece need each other's results")
    found_levels: dict[int, list[Node]] = {}
    for node in nodes:
        if node in group_of:
            found_levels.setdefault(depth(node), []).append(node)
    return dict(sorted(found_levels.items()))


def _through(used: Node, group_of: Mapping[Node, int], depth: int, group: int | None) -> int:
    """Return the depth at which a node of `group` (None: outside) may run for the sake of one value that it uses."""
    if used.op in ("placeholder", "get_attr"):
        return 0 if group is None else 1
    return depth if group is None or used in group_of else depth + 1
