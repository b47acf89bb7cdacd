"""Two partitions are joined only where no path leaves the joined one and comes back through another."""

from torch.fx import Graph, Node

from triptych.compiler.targets.acyclic_partitions import makes_cycle


def graph_of(**inputs: tuple[str, ...]) -> dict[str, Node]:
    """Build a graph of calls by name, each with the calls it takes."""
    graph = Graph()
    nodes: dict[str, Node] = {}
    for name, taken in inputs.items():
        nodes[name] = graph.call_function(len, tuple(nodes[one] for one in taken))
    return nodes


def test_a_path_through_a_call_outside() -> None:
    nodes = graph_of(a=(), outside=("a",), b=("outside",))
    assert makes_cycle([[nodes["a"]], [nodes["b"]]], {nodes["a"], nodes["b"]})


def test_a_path_through_two_calls_of_another_partition() -> None:
    """No path of calls leads from a to b; but c and d run as one, take from a and give to b."""
    nodes = graph_of(a=(), c=(), d=("a",), b=("c",))
    other = [nodes["c"], nodes["d"]]
    assert makes_cycle([[nodes["a"]], [nodes["b"]], other], {nodes["a"], nodes["b"]})
    assert not makes_cycle([[nodes["a"]], [nodes["b"]]], {nodes["a"], nodes["b"]})


def test_neighbours_without_another_way_round() -> None:
    nodes = graph_of(a=(), b=("a",), c=("b",))
    assert not makes_cycle([[nodes["a"]], [nodes["b"]], [nodes["c"]]], {nodes["a"], nodes["b"]})
