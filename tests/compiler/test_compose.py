"""Two methods as one: what it computes, what it takes, and what cannot be joined."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler import storage
from triptych.compiler.compose import compose
from triptych.compiler.model import CONTEXT, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.program import Method, Program
from triptych.compiler.provenance import MADE_BY, made_by, source_line
from triptych.compiler.roles import OTHER, PREFILL
from triptych.compiler.stages import Source
from triptych.compiler.verifier import verify
from triptych.errors import VerificationError
from triptych.manifest import DynamicDim, TensorSignature

WIDTH = 4
LIMIT = 24


class Parts(nn.Module):
    """A table, a projection, a counter of calls and a running sum."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("total", torch.zeros(WIDTH))

    def add(self, x: Tensor) -> Tensor:
        """Add `x`, [..., WIDTH], to the running sum and return what it was before plus `x`."""
        before = self.total.clone()
        self.total.copy_(self.total + x.sum(0))
        return x + before


def port(name: str, *shape: int | DynamicDim, dtype: str = "float32") -> TensorSignature:
    return TensorSignature(name, dtype, shape)


def rows(name: str = "S", minimum: int = 1, maximum: int = CONTEXT) -> DynamicDim:
    return DynamicDim(name, minimum, maximum)


def entry(name: str, forward: Callable[..., Any], *inputs: TensorSignature, outputs: int = 1) -> EntryPoint:
    ports = tuple(OutputPort(f"out{index or ''}") for index in range(outputs))
    return EntryPoint(name, frozenset({OTHER}), forward, inputs, ports)


def captured(*entries: EntryPoint) -> Program:
    torch.manual_seed(0)
    model = Model(Parts().eval(), entries, Metadata(LIMIT, LIMIT, 6))
    return Source(model).capture().program


def joined(producer: EntryPoint, consumer: EntryPoint, **ports: str) -> tuple[Program, Method]:
    program = captured(producer, consumer)
    return program, compose(program.methods[producer.name], program.methods[consumer.name], ports or {"out": "x"})


def run(method: Method, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return method.exported.module()(*inputs)


LOOK_UP = entry("look_up", lambda parts, ids: parts.table(ids), port("ids", rows(), dtype="int64"))
PROJECT = entry("project", lambda parts, x: parts.project(x).relu(), port("x", rows(), WIDTH))


# ------------------------------------------------------------------------------------------------ a language model


@pytest.fixture(scope="module")
def program() -> Program:
    return tiny.captured(tiny.tiny(layers=1)).program


@pytest.fixture(scope="module")
def whole(program: Program) -> Method:
    return compose(program.methods["token_embedding"], program.methods["prefill"], {"embeds": "embeds"})


def test_prefill_takes_tokens_and_keeps_what_it_is(program: Program, whole: Method) -> None:
    assert [(one.name, one.shape) for one in whole.inputs] == [
        ("tokens", (1, DynamicDim("S", 1, tiny.CONTEXT_LENGTH))),
        ("start_pos", (1,)),
    ]
    assert whole.roles == frozenset({PREFILL})
    assert whole.outputs == program.methods["prefill"].outputs
    assert whole.inputs[0].links == ("tokens",)


@pytest.mark.parametrize("length", [1, 2, 7, tiny.CONTEXT_LENGTH])
def test_it_computes_what_the_model_computes(whole: Method, length: int) -> None:
    tokens = torch.randint(0, tiny.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        wanted = tiny.tiny(layers=1).module(tokens)
    torch.testing.assert_close(run(whole, tokens, torch.tensor([0])), wanted, rtol=1e-5, atol=1e-5)


def test_weights_and_state_stay_what_the_other_methods_have(program: Program, whole: Method) -> None:
    changed = program.with_methods({"prefill": whole, "decode": program.methods["decode"]})
    verify(changed)
    assert changed.state.keys() == program.state.keys()
    assert sum(one.nbytes for one in changed.weights.values()) == sum(one.nbytes for one in program.weights.values())
    tied = next(one for one in changed.weights.values() if "head.weight" in one.names)
    assert tied.names == ("embedding.weight", "head.weight")


def test_every_node_keeps_its_line_and_its_pass(program: Program) -> None:
    embedding = program.methods["token_embedding"]
    node = next(one for one in embedding.exported.graph.nodes if one.op == "call_function")
    node.meta[MADE_BY] = "some-pass"
    try:
        method = compose(embedding, program.methods["prefill"], {"embeds": "embeds"})
    finally:
        del node.meta[MADE_BY]
    calls = [one for one in method.exported.graph.nodes if one.op == "call_function"]
    assert [made_by(one) for one in calls][:2] == ["some-pass", "capture"]
    assert [source_line(one) is not None for one in calls].count(False) == 0


def test_it_is_saved_and_read_back(program: Program, whole: Method, tmp_path: Path) -> None:
    storage.save(program.with_methods({"prefill": whole}), tmp_path / "program")
    again = storage.load(tmp_path / "program").methods["prefill"]
    assert again.inputs == whole.inputs
    tokens = torch.arange(5).unsqueeze(0)
    torch.testing.assert_close(run(again, tokens, torch.tensor([0])), run(whole, tokens, torch.tensor([0])))


# ------------------------------------------------------------------------------------------------ dimensions


def test_ranges_meet_in_what_both_allow() -> None:
    narrow = replace(PROJECT, inputs=(port("x", rows("T", 2, 9), WIDTH),))
    program, method = joined(LOOK_UP, narrow)
    assert method.inputs[0].shape == (DynamicDim("T", 2, 9),)
    ids = torch.tensor([0, 3, 5])
    torch.testing.assert_close(run(method, ids), run(program.methods["project"], run(program.methods["look_up"], ids)))


def test_a_dynamic_size_becomes_the_fixed_one_that_is_taken() -> None:
    fixed = replace(PROJECT, inputs=(port("x", 3, WIDTH),))
    program, method = joined(LOOK_UP, fixed)
    assert method.inputs[0].shape == (3,)
    ids = torch.tensor([5, 0, 2])
    torch.testing.assert_close(run(method, ids), run(program.methods["project"], run(program.methods["look_up"], ids)))


def test_dimensions_that_do_not_meet_stay_apart_and_get_names_of_their_own() -> None:
    def pooled(parts: Any, ids: Tensor) -> Tensor:
        return parts.table(ids).mean(0)

    def added(parts: Any, x: Tensor, y: Tensor) -> Tensor:
        return parts.project(y) + x

    pool = entry("pool", pooled, port("ids", rows(maximum=5), dtype="int64"))
    add = entry("add", added, port("x", WIDTH), port("y", rows(), WIDTH))
    program, method = joined(pool, add)
    (ids, y) = method.inputs
    assert y.shape == (DynamicDim("S", 1, LIMIT), WIDTH)
    assert isinstance(ids.shape[0], DynamicDim)
    assert (ids.shape[0].minimum, ids.shape[0].maximum) == (1, 5)
    assert ids.shape[0].name != "S"
    inputs = torch.tensor([1, 4, 4]), torch.randn(7, WIDTH)
    wanted = run(program.methods["add"], run(program.methods["pool"], inputs[0]), inputs[1])
    torch.testing.assert_close(run(method, *inputs), wanted)


def test_a_branch_in_the_producer_moves_along() -> None:
    def chosen(parts: Any, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: parts.project(x).relu() + x.shape[0], lambda x: x * 2, (x,))

    program, method = joined(entry("choose", chosen, port("x", rows(), WIDTH)), PROJECT)
    verify(program.with_methods({"both": method}))
    for sign in (1, -1):
        x = sign * torch.ones(5, WIDTH)
        wanted = run(program.methods["project"], run(program.methods["choose"], x))
        torch.testing.assert_close(run(method, x), wanted)


def test_a_number_read_from_a_tensor_moves_along(tmp_path: Path) -> None:
    def cut(parts: Any, ids: Tensor, count: Tensor) -> Tensor:
        length = count.item()
        torch._check(length >= 0)
        torch._check(length <= ids.shape[0])
        return parts.table(ids)[:length].sum(0, keepdim=True)

    cutter = entry("cut", cut, port("ids", rows(), dtype="int64"), port("count", 1, dtype="int64"))
    program, method = joined(cutter, replace(PROJECT, inputs=(port("x", 1, WIDTH),)))
    storage.save(program.with_methods({"both": method}), tmp_path / "program")
    ids, count = torch.tensor([1, 2, 3, 4]), torch.tensor([3])
    wanted = run(program.methods["project"], run(program.methods["cut"], ids, count))
    torch.testing.assert_close(run(storage.load(tmp_path / "program").methods["both"], ids, count), wanted)


def test_a_layout_that_the_input_did_not_have_is_put_right() -> None:
    turned = entry("turn", lambda parts, y: y.transpose(0, 1), port("y", WIDTH, rows()))
    flat = entry("flat", lambda parts, x: x.view(-1), port("x", rows(), WIDTH))
    program, method = joined(turned, flat)
    verify(program.with_methods({"both": method}))
    y = torch.randn(WIDTH, 3)
    torch.testing.assert_close(run(method, y), y.t().reshape(-1))


# ------------------------------------------------------------------------------------------------ tensors and inputs


def test_state_is_written_by_the_producer_before_the_consumer_reads_it() -> None:
    summing = entry("summing", lambda parts, x: parts.add(x), port("x", rows(), WIDTH))
    reading = entry("reading", lambda parts, x: parts.add(x * 0) + parts.total, port("x", rows(), WIDTH))
    program, method = joined(summing, reading)
    assert list(program.with_methods({"both": method}).state) == ["total"]
    x = torch.ones(2, WIDTH)
    assert run(method, x).tolist() == [[4.0] * WIDTH] * 2


def test_inputs_of_one_name_are_one_input() -> None:
    scaled = entry("scaled", lambda parts, x, by: parts.project(x) * by, port("x", rows(), WIDTH), port("by", 1))
    shifted = entry("shifted", lambda parts, ids, by: parts.table(ids) + by, port("ids", rows(), dtype="int64"))
    shifted = replace(shifted, inputs=(*shifted.inputs, port("by", 1)))
    program, method = joined(shifted, scaled)
    assert [one.name for one in method.inputs] == ["ids", "by"]
    ids, by = torch.tensor([2, 3]), torch.tensor([7.0])
    wanted = run(program.methods["scaled"], run(program.methods["shifted"], ids, by), by)
    torch.testing.assert_close(run(method, ids, by), wanted)


def test_weights_that_only_share_a_name_stay_two() -> None:
    program, other = captured(LOOK_UP, PROJECT), captured(LOOK_UP, PROJECT)
    with torch.no_grad():
        weight = other.methods["project"].exported.state_dict["project.weight"]
        weight.mul_(-1)
    method = compose(other.methods["project"], program.methods["project"], {"out": "x"})
    both = program.with_methods({"both": method})
    x = torch.randn(3, WIDTH)
    wanted = run(program.methods["project"], run(other.methods["project"], x))
    torch.testing.assert_close(run(method, x), wanted)
    assert len(both.weights) == 4
    assert {name for one in both.weights.values() for name in one.names} == {
        "project.weight", "project.weight_1", "project.bias", "project.bias_1",
    }  # fmt: skip


def test_two_of_several_outputs_are_joined_and_the_others_dropped() -> None:
    three = entry("three", lambda parts, y: (y + 1, y + 2, y + 3), port("y", WIDTH), outputs=3)
    minus = entry("minus", lambda parts, x, z: x - 10 * z, port("x", WIDTH), port("z", WIDTH))
    _, method = joined(three, minus, out2="x", out="z")
    assert run(method, torch.zeros(WIDTH)).tolist() == [3.0 - 10.0] * WIDTH


# ------------------------------------------------------------------------------------------------ what cannot be joined

TWO = entry("two", lambda parts, x, y: parts.project(x) + y, port("x", WIDTH), port("y", WIDTH))
FOUR_ROWS = entry("four", lambda parts, y: parts.project(y), port("y", 4, WIDTH))
WRONG: dict[str, tuple[EntryPoint, EntryPoint, dict[str, str], str]] = {
    "an unknown output": (LOOK_UP, PROJECT, {"embeds": "x"}, "the producer has no output 'embeds'; it has out"),
    "an unknown input": (LOOK_UP, PROJECT, {"out": "embeds"}, "the consumer has no input 'embeds'; it has x"),
    "another dtype": (
        entry("ids", lambda parts, ids: ids + 1, port("ids", rows(), WIDTH, dtype="int64")),
        PROJECT,
        {"out": "x"},
        r"out → x: int64 \[.*\] is produced, float32 \[.*\] is taken; both must have one dtype and rank",
    ),
    "another rank": (LOOK_UP, TWO, {"out": "x"}, "both must have one dtype and rank"),
    "two outputs for one input": (
        entry("three", lambda parts, y: (y + 1, y + 2), port("y", WIDTH), outputs=2),
        TWO,
        {"out": "x", "out1": "x"},
        "one input takes one output",
    ),
    "another fixed size": (
        FOUR_ROWS,
        replace(PROJECT, inputs=(port("x", 3, WIDTH),)),
        {"out": "x"},
        "out → x, axis 0: 4 is produced, 3 is taken",
    ),
    "a fixed size where any is taken": (
        FOUR_ROWS,
        PROJECT,
        {"out": "x"},
        r"out → x, axis 0: 4 is produced, a dynamic number \(1 to 24\) is taken",
    ),
    "ranges with nothing in common": (
        replace(LOOK_UP, inputs=(port("ids", rows(maximum=4), dtype="int64"),)),
        replace(PROJECT, inputs=(port("x", rows(minimum=6), WIDTH),)),
        {"out": "x"},
        "out → x, axis 0: 1 to 4 is produced, 6 to 24 is taken",
    ),
    "sizes that are not always equal": (
        entry("double", lambda parts, y: torch.cat([y, y]), port("y", rows(maximum=9), WIDTH)),
        PROJECT,
        {"out": "x"},
        "are not always equal",
    ),
    "one name for different inputs": (
        entry("named", lambda parts, y: y * 2, port("y", 2, WIDTH)),
        entry("other", lambda parts, x, y: x + y, port("x", 2, WIDTH), port("y", WIDTH)),
        {"out": "x"},
        "both methods take 'y', the producer as torch.float32 with 2 dimensions, the consumer as torch.float32 with 1",
    ),
}


@pytest.mark.parametrize(("producer", "consumer", "ports", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(
    producer: EntryPoint, consumer: EntryPoint, ports: dict[str, str], message: str
) -> None:
    with pytest.raises(VerificationError, match=message):
        joined(producer, consumer, **ports)


def test_state_of_two_programs_is_refused() -> None:
    summing = entry("summing", lambda parts, x: parts.add(x), port("x", rows(), WIDTH))
    one, other = (captured(summing).methods["summing"] for _ in range(2))
    with pytest.raises(VerificationError, match="'total' is not one row in the two methods; compose methods of one"):
        compose(one, other, {"out": "x"})


def test_nothing_to_join_is_refused(program: Program) -> None:
    with pytest.raises(VerificationError, match="nothing is to be joined"):
        compose(program.methods["token_embedding"], program.methods["prefill"], {})
