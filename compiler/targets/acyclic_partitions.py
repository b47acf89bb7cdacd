# ruff: noqa: SLF001 (ExecuTorch has no public way to say which partitions may be joined)
"""Partitions that can run one after another.

ExecuTorch joins two partitions where no path of calls leads out of the joined one and back. Once others have become
one call each, such a path may lead through them: partition A feeds B by one of its calls, and B feeds A by another.
Fusing then ends with "found dependency cycles". Two norms on either side of a branch are enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.fx import Node


@contextmanager
def acyclic_partitions() -> Iterator[None]:
    """Let ExecuTorch's grouping partitioner join two partitions only where no cycle through others comes of it."""
    from executorch.exir.backend.canonical_partitioners.group_partitioner import GroupBasedPartitioner

    joins = GroupBasedPartitioner._can_merge_partitions

    def joins_without_cycle(partitioner: Any, one: int, other: int, partitions: Mapping[int, Any]) -> bool:
        if not joins(partitioner, one, other, partitions):
            return False
        return not makes_cycle(
            [list(partition.nodes) for partition in partitions.values()], _nodes(partitions, one, other)
        )

    GroupBasedPartitioner._can_merge_partitions = joins_without_cycle
    try:
        yield
    finally:
        GroupBasedPartitioner._can_merge_partitions = joins


def makes_cycle(partitions: Iterable[Iterable[Node]], joined: set[Node]) -> bool:
    """Return whether a path leaves `joined` and comes back, where each of `partitions` runs as a whole."""
    whole = {node: tuple(nodes) for nodes in map(tuple, partitions) for node in nodes}
    waiting = [user for node in joined for user in node.users if user not in joined]
    reached: set[Node] = set(waiting)
    while waiting:
        node = waiting.pop()
        for member in whole.get(node, (node,)):
            for user in member.users:
                if user in joined:
                    return True
                if user not in reached:
                    reached.add(user)
                    waiting.append(user)
    return False


def _nodes(partitions: Mapping[int, Any], *chosen: int) -> set[Node]:
    return {node for number in chosen for node in partitions[number].nodes}
