"""Wrong edits of a graph, by kind: what `triptych.testing.mutation` makes mutations of.

Each kind is a function from a `Site` (one node of a method) to the edits of that kind that apply there, in a fixed
order. An edit keeps the shapes and dtypes that the rest of the graph relies on, so that what catches it is the
arithmetic and not a crash; only the edits of a method's outputs change them, which is for the verifier to see.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch.fx import Node

from triptych.compiler.editing import GraphEditor
from triptych.testing.sites import Site, adds_epsilon, arguments_of, form_of, is_even, is_float, tensor_of, writes

aten = torch.ops.aten

COMMUTATIVE: Final = frozenset({"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"})
SLIDING: Final[Mapping[str, str]] = {"le": "lt", "lt": "le", "ge": "gt", "gt": "ge"}
EPSILON_FACTOR: Final = 1e5
"""1e-6 becomes 0.1: beside a mean square of a few units, 1e-3 would move less than float32 is allowed."""

Edit = tuple[str, Callable[[], None]]
"""What is done, in words, and the function that does it to the site's editor."""


def operands(site: Site) -> Iterator[Edit]:
    """Arguments in the wrong order, or an argument taken from an older value of the same shape."""
    node, tensors = site.node, site.tensors() if site.operator else []
    for index, (i, first) in enumerate(tensors):
        for j, second in tensors[index + 1 :]:
            alike = form_of(first) == form_of(second) and site.operator not in COMMUTATIVE
            if (alike or site.operator in SLIDING) and site.numbers[first] != site.numbers[second]:
                yield f"arguments {i} and {j} exchanged", partial(_exchange, node, i, j)
    for i, used in tensors if tensor_of(node) is not None else ():
        older = _older_alike(site, used) if used.op == "call_function" and is_float(used) else None
        if older is not None:
            yield f"argument {i} taken from {older.name}", partial(node.update_arg, i, older)


def _exchange(node: Node, i: int, j: int) -> None:
    first, second = node.args[i], node.args[j]
    node.update_arg(i, second)
    node.update_arg(j, first)


def _older_alike(site: Site, used: Node) -> Node | None:
    """Return the nearest earlier value that could stand for `used` and is another one."""
    taken = {site.numbers[one] for one in site.node.all_input_nodes}
    node = site.node.prev
    while node.op == "call_function":
        if form_of(node) == form_of(used) and site.numbers[node] not in taken:
            return node
        node = node.prev
    return None


def constants(site: Site) -> Iterator[Edit]:
    """A number of the arithmetic off by 1 %, an integer by one, an epsilon by so much that it guards no more."""
    guards = adds_epsilon(site.node)
    for argument in arguments_of(site.node) if site.operator != "arange" else ():
        value = site.argument(argument.name)
        is_arithmetic = any(kind in str(argument.type) for kind in ("float", "number", "Tensor"))
        if not is_arithmetic or isinstance(value, bool) or not isinstance(value, (int, float)) or value == 0:
            continue
        if argument.name == "eps" or (guards and argument.name != "alpha"):
            wrong = value * EPSILON_FACTOR
        elif guards:
            continue
        else:
            wrong = value + 1 if isinstance(value, int) else value * 1.01
        yield f"{argument.name} {value:g} becomes {wrong:g}", partial(site.put, argument.name, wrong)


def axes(site: Site) -> Iterator[Edit]:
    """Two axes exchanged where sizes allow it, and heads split off or merged in the wrong order."""
    node, value = site.node, tensor_of(site.node)
    if value is None or not is_float(node) or not node.users or site.bound in site.state:
        return
    if site.operator or (site.bound is not None and value.dim() == 2):
        for j in range(value.dim()):
            for i in range(j):
                sizes: tuple[Any, Any] = value.shape[i], value.shape[j]
                if all(isinstance(size, int) and size > 1 for size in sizes) and sizes[0] == sizes[1]:
                    yield f"axes {i} and {j} exchanged", partial(_follow, site, aten.transpose.int, i, j)
    if site.operator in ("view", "reshape", "flatten", "unflatten"):
        yield from _regroupings(site)


def _regroupings(site: Site) -> Iterator[Edit]:
    node, source = site.node, site.node.args[0]
    assert isinstance(source, Node)
    new, old = node.meta["val"].shape, source.meta["val"].shape
    shorter = min(len(new), len(old))
    if abs(len(new) - len(old)) != 1 or str(new[: shorter - 1]) != str(old[: shorter - 1]):
        return
    outer, inner = (new if len(new) > len(old) else old)[-2:]
    if not all(isinstance(size, int) and size > 1 for size in (outer, inner)):
        return

    def split(editor: GraphEditor) -> Node:
        exchanged = editor.call(aten.unflatten.int, source, -1, [inner, outer], like=node)
        return editor.call(aten.transpose.int, exchanged, -2, -1, like=node)

    if len(new) > len(old):
        yield "last axis split the other way round", partial(site.follow, split)
    else:
        yield "last axes merged the other way round", partial(_precede, site, 0, aten.transpose.int, -2, -1)


def parts(site: Site) -> Iterator[Edit]:
    """The wrong part of a tensor: slice bounds, an index, the order of what is joined or split off."""
    node = site.node
    if site.operator == "slice":
        yield from _slides(site)
    elif site.operator == "select":
        source, index = node.args[0], site.argument("index")
        assert isinstance(source, Node)
        if str(source.meta["val"].shape[site.argument("dim")]) != "1":
            other = index - 1 if index else 1
            yield f"index {index} becomes {other}", partial(site.put, "index", other)
    elif site.operator == "cat":
        joined = node.args[0]
        assert isinstance(joined, (list, tuple))
        if len({site.numbers[one] for one in joined if isinstance(one, Node)}) > 1:
            yield "joined in the other order", partial(node.update_arg, 0, list(reversed(joined)))
    elif node.target is operator.getitem and form_of(node) is not None:
        whole = node.args[0]
        assert isinstance(whole, Node)
        alike = [one for one in whole.users if form_of(one) == form_of(node) and one.args[1] != node.args[1]]
        if alike:
            yield f"part {node.args[1]} becomes {alike[0].args[1]}", partial(node.update_arg, 1, alike[0].args[1])


def _slides(site: Site) -> Iterator[Edit]:
    """Move both bounds of a slice by one, so that its length stays."""
    dim, start, end = (site.argument(name) for name in ("dim", "start", "end"))
    source = site.node.args[0]
    assert isinstance(source, Node)
    size = source.meta["val"].shape[dim]
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        first, last = (min(bound % size if bound < 0 else bound, size) for bound in (start, end))
        shift = 1 if last < size else -1 if first > 0 else 0
        if shift:
            bounds = (first + shift, last + shift)
            yield f"{first}:{last} becomes {bounds[0]}:{bounds[1]}", partial(_put_bounds, site, *bounds)
    elif start == -1:
        yield "the last but one in place of the last", partial(_put_bounds, site, -2, -1)


def _put_bounds(site: Site, start: int, end: int) -> None:
    site.put("start", start)
    site.put("end", end)


def masks(site: Site) -> Iterator[Edit]:
    """A mask left out, inverted, or shifted by one; causality switched on or off."""
    node, name = site.node, site.operator
    if name in SLIDING:
        target = getattr(getattr(aten, SLIDING[name]), str(node.target).rpartition(".")[2])
        yield f"{name} becomes {SLIDING[name]}", partial(setattr, node, "target", target)
        yield "inverted", partial(_follow, site, aten.logical_not.default)
    elif name in ("tril", "triu"):
        diagonal = site.argument("diagonal")
        for other in (diagonal - 1, diagonal + 1):
            yield f"diagonal {diagonal} becomes {other}", partial(site.put, "diagonal", other)
    elif name == "scaled_dot_product_attention":
        if site.argument("attn_mask") is not None:
            yield "mask left out", partial(site.put, "attn_mask", None)
        else:
            causal = bool(site.argument("is_causal"))
            yield f"is_causal becomes {not causal}", partial(site.put, "is_causal", not causal)


def positions(site: Site) -> Iterator[Edit]:
    """A position one too high, or the start of the sequence taken for where it goes on."""
    value = tensor_of(site.node)
    starts = {port.name for port in site.method.inputs if "position" in port.links}
    for i, used in site.tensors() if site.operator else ():
        if used.op == "placeholder" and used.name in starts:
            yield f"{used.name} is one too high", partial(_precede, site, i, aten.add.Tensor, 1)
            yield f"{used.name} is taken for 0", partial(_precede, site, i, aten.mul.Tensor, 0)
    if site.operator == "arange":
        yield "counts from 1", partial(_follow, site, aten.add.Tensor, 1)
    if site.bound is not None and site.bound not in site.state and value is not None and value.dtype == torch.int64:
        yield "rolled by one", partial(_follow, site, aten.roll.default, [1], [-1])


def aliases(site: Site) -> Iterator[Edit]:
    """A state row that is not the one meant (a copy, another layer's, the method's own) or that is added to."""
    editor, node, name = site.editor, site.node, site.bound
    for i, row in site.tensors() if site.operator else ():
        row_name = editor.tensor_name(row)
        if row_name not in site.state:
            continue
        kind = arguments_of(node)[i].alias_info
        if node.target is aten.index_copy_.default:
            yield f"adds to what {row_name} holds", partial(setattr, node, "target", aten.index_add_.default)
        if kind is not None and kind.is_write:
            yield f"writes to a copy of {row_name}", partial(_precede, site, i, aten.clone.default)
        else:
            yield f"reads {row_name} as it was before the call", partial(_read_old, site, i, row)
        other = site.namesake(row)
        if other is not None:
            yield f"takes {editor.tensor_name(other)} for {row_name}", partial(node.update_arg, i, other)
    if name in site.state:
        yield "a row of the method's own", lambda: site.rebind("own", editor.tensor(node).clone())
        other = site.namesake(node)
        if other is not None:
            storage = editor.tensor(other)
            yield f"in the storage of {editor.tensor_name(other)}", lambda: site.rebind("shared", storage)


def _read_old(site: Site, position: int, row: Node) -> None:
    with site.editor.graph.inserting_before(site.editor.last_placeholder.next):
        before = site.editor.call(aten.clone.default, row)
    site.node.update_arg(position, before)


def dtypes(site: Site) -> Iterator[Edit]:
    """A value narrowed and widened again: floats to bfloat16, positions to int8.

    The rounding of float16 shows where a value is stored or returned; further inside it averages out to less than
    what float32 is allowed, as bfloat16 does in vectors such as biases.
    """
    node, value, name = site.node, tensor_of(site.node), site.bound
    if value is None or name in site.state or not node.users:
        return
    if name is not None:
        tensor = site.editor.tensor(node)
        if tensor.is_floating_point() and tensor.dim() > 1:
            rounded = tensor.to(torch.bfloat16).to(tensor.dtype)
            if not torch.equal(rounded, tensor):
                yield "through bfloat16", lambda: site.rebind("narrow", rounded)
    elif value.dtype in (torch.float32, torch.float64):
        yield "through bfloat16", partial(_narrow, site, torch.bfloat16)
        if any(user.op == "output" or writes(user) for user in node.users):
            yield "through float16", partial(_narrow, site, torch.float16)
    elif value.dtype == torch.int64 and not _counts_below(site, torch.iinfo(torch.int8).max):
        yield "through int8", partial(_narrow, site, torch.int8)


def _counts_below(site: Site, limit: int) -> bool:
    """True for a range from 0 that ends before `limit`."""
    end = site.argument("end") if site.operator == "arange" else None
    return isinstance(end, int) and len(site.node.args) == 1 and end <= limit


def _narrow(site: Site, dtype: torch.dtype) -> None:
    def through(editor: GraphEditor) -> Node:
        narrow = editor.call(aten.to.dtype, site.node, dtype, like=site.node)
        return editor.call(aten.to.dtype, narrow, site.node.meta["val"].dtype, like=site.node)

    site.follow(through)


def weights(site: Site) -> Iterator[Edit]:
    """A weight 1 % too large, or that of another layer."""
    node = site.node
    if site.bound is None or site.bound in site.state or not is_float(node):
        return
    yield "scaled by 1.01", lambda: site.rebind("scaled", site.editor.tensor(node) * 1.01)
    other = site.namesake(node)
    if other is not None:
        yield f"taken from {site.editor.tensor_name(other)}", partial(site.redirect, other)


def dropped(site: Site) -> Iterator[Edit]:
    """An operator left out: its result is one of its inputs; or an optional tensor, such as a bias, left out."""
    node = site.node
    if not site.operator or not is_float(node) or not node.users:
        return
    for one in dict.fromkeys(node.all_input_nodes):
        if form_of(one) == form_of(node) and site.numbers[one] != site.numbers[node]:
            yield f"replaced by its input {one.name}", partial(site.redirect, one)
    for argument in arguments_of(node):
        is_optional = "Optional[Tensor]" in str(argument.type) and argument.name != "attn_mask"
        if is_optional and isinstance(site.argument(argument.name), Node):
            yield f"{argument.name} left out", partial(site.put, argument.name, None)


def signs(site: Site) -> Iterator[Edit]:
    """A result with the other sign."""
    node = site.node
    if site.operator and is_float(node) and node.users and not all(map(is_even, node.users)):
        yield "negated", partial(_follow, site, aten.neg.default)


def outputs(site: Site) -> Iterator[Edit]:
    """A result returned in another dtype, without its last element, or with its rows in the other order."""
    node = site.node
    if node not in site.editor.user_outputs or not is_float(node):
        return
    sizes = node.meta["val"].shape
    yield "returned in bfloat16", partial(_return, site, aten.to.dtype, torch.bfloat16)
    yield "last element left out", partial(_return, site, aten.slice.Tensor, -1, 0, -1)
    if len(sizes) > 1 and str(sizes[-2]) != "1":
        yield "rows in the other order", partial(_return, site, aten.flip.default, [-2])


def _return(site: Site, target: Callable[..., Any], *arguments: Any) -> None:
    editor, index = site.editor, site.editor.user_outputs.index(site.node)
    with editor.graph.inserting_before(editor.graph.output_node()):
        editor.replace_user_output(index, editor.call(target, site.node, *arguments, like=site.node))


def _follow(site: Site, target: Callable[..., Any], *arguments: Any) -> None:
    """Let the users of the node have `target(node, *arguments)`."""
    site.follow(lambda editor: editor.call(target, site.node, *arguments, like=site.node))


def _precede(site: Site, position: int, target: Callable[..., Any], *arguments: Any) -> None:
    """Let the node have `target(argument, *arguments)` for its argument at `position`."""
    given = site.node.args[position]
    site.put_made(position, lambda editor: editor.call(target, given, *arguments, like=site.node))


KINDS: Final[Mapping[str, Callable[[Site], Iterator[Edit]]]] = {
    "operand": operands,
    "constant": constants,
    "axes": axes,
    "part": parts,
    "mask": masks,
    "position": positions,
    "alias": aliases,
    "dtype": dtypes,
    "weight": weights,
    "dropped": dropped,
    "sign": signs,
    "output": outputs,
}
"""The kinds of mutation, each with the function that finds the edits of that kind at a site."""
