"""A call's partition follows from its depth, so that partitions run one after another."""

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from triptych.compiler.targets.levels import levels
from triptych.errors import LoweringError


def graph_of(**inputs: tuple[str, ...]) -> dict[str, Node]:
    """Build a graph of calls by name, each with the calls it takes; names in capitals are inputs of the graph."""
    graph = Graph()
    nodes: dict[str, Node] = {}
    for name, taken in inputs.items():
        nodes[name] = (
            graph.placeholder(name) if name.isupper() else graph.call_function(len, tuple(nodes[one] for one in taken))
        )
    return nodes


def found(nodes: dict[str, Node], *groups: str) -> list[set[str]]:
    """The partitions by name, in order; a group is given as names with blanks between them."""
    names = {node: name for name, node in nodes.items()}
    chosen = [[nodes[name] for name in group.split()] for group in groups]
    graph = next(iter(nodes.values())).graph
    return [{names[node] for node in part} for part in levels(graph, chosen).values()]


def test_calls_without_anything_between_them_are_one() -> None:
    nodes = graph_of(X=(), a=("X",), b=("a",), c=("X",), d=("b", "c"))
    assert found(nodes, "a", "b", "c", "d") == [{"a", "b", "c", "d"}]


def test_a_call_outside_divides() -> None:
    nodes = graph_of(X=(), a=("X",), outside=("a",), b=("outside",), c=("a",), d=("b", "c"))
    assert found(nodes, "a", "b", "c", "d") == [{"a", "c"}, {"b", "d"}]


def test_two_calls_of_one_group_do_not_close_a_cycle() -> None:
    """Joined with what follows the outside call, c would have to run before and after it."""
    nodes = graph_of(X=(), c=("X",), a=("X",), outside=("a",), d=("outside",), b=("c",))
    assert found(nodes, "a", "b", "c d") == [{"a"}, {"c", "d", "b"}]


def test_a_group_waits_for_its_last_member() -> None:
    nodes = graph_of(X=(), early=("X",), after=("early",), a=("X",), outside=("a",), late=("outside",))
    assert found(nodes, "early late", "after", "a") == [{"a"}, {"early", "after", "late"}]


def test_constants_go_with_their_group_and_hold_nobody_up() -> None:
    nodes = graph_of(X=(), W=(), a=("X", "W"), outside=("a",), b=("outside", "W"))
    assert found(nodes, "a", "b W") == [{"a"}, {"W", "b"}]


def test_parts_of_a_result_go_with_it() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(divmod, (x, x))
    part = graph.call_function(operator.getitem, (pair, 0))
    assert levels(graph, [[pair]]) == {1: [pair, part]}


def test_groups_that_need_each_other_are_refused() -> None:
    nodes = graph_of(X=(), a=("X",), one=("a",), b=("one",), c=("X",), other=("c",), d=("other",))
    with pytest.raises(LoweringError, match="need each other's results"):
        found(nodes, "a d", "b c")


@given(st.data())
def test_no_path_leaves_a_partition_and_comes_back(data: st.DataObject) -> None:
    graph = Graph()
    nodes = [graph.placeholder("x")]
    inside = []
    for _ in range(data.draw(st.integers(1, 25))):
        taken = data.draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=3))
        nodes.append(graph.call_function(len, tuple(taken)))
        if data.draw(st.booleans()):
            inside.append(nodes[-1])
    where = {node: depth for depth, part in levels(graph, [[node] for node in inside]).items() for node in part}
    assert set(where) == set(inside)
    # What a partition needs of others lies in earlier ones, however far back.
    needs: dict[Node, int] = {}
    for node in nodes[1:]:
        needs[node] = max((where.get(one, needs.get(one, 0)) for one in node.all_input_nodes), default=0)
        if node in where:
            assert all(
                where[node] > needs[one] if one not in where else where[node] >= where[one]
                for one in node.all_input_nodes
                if one in needs
            )
