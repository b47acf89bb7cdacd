"""The tables of a program say what its graphs do: state once, weights once, who reads, writes, uses and feeds."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.compiler.editing import copy_graph_module, rebuild, storage_identity
from triptych.compiler.model import EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.program import Method, Program
from triptych.compiler.roles import OTHER, Role
from triptych.compiler.stages import Source
from triptych.errors import ModelError, VerificationError
from triptych.manifest import TensorSignature

KEYS = "blocks.0.attention.routed_attention.cache.keys"
VALUES = "blocks.0.attention.routed_attention.cache.values"


class Memory(nn.Module):
    """One method fills a buffer, the other only reads it: how an encoder serves a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(1, 4))

    def fill(self, x: Tensor) -> Tensor:
        self.memory.copy_(x)
        return x * 2

    def recall(self, x: Tensor) -> Tensor:
        return x + self.memory


def with_tensors(method: Method, tensors: dict[str, Tensor]) -> Method:
    """Return `method` with other tensors bound to some of its names."""
    exported = method.exported
    state = {name: tensors.get(name, tensor) for name, tensor in exported.state_dict.items()}
    return dataclasses.replace(method, exported=rebuild(exported, copy_graph_module(exported), state_dict=state))


def edges(program: Program, kind: str) -> set[tuple[str, str]]:
    return {(start, end) for start, end, data in program.graph.edges(data=True) if data["kind"] == kind}


def test_each_layer_has_one_row_for_keys_and_one_for_values(tiny_program: Program) -> None:
    assert len(tiny_program.state) == 2 * 2
    row = tiny_program.state[KEYS]
    assert (row.shape, row.dtype, row.layout) == ((1, 24, 2, 16), torch.float32, "BSHD")
    assert not row.initial.any()


@pytest.mark.parametrize("name", [KEYS, VALUES])
def test_prefill_and_decode_both_read_and_write_the_one_row(tiny_program: Program, name: str) -> None:
    row = tiny_program.state[name]
    assert set(row.readers) == {"prefill", "decode"}
    assert set(row.writers) == {"prefill", "decode"}
    bound = [tiny_program.methods[one].exported.state_dict[name] for one in ("prefill", "decode")]
    assert storage_identity(bound[0]) == storage_identity(bound[1]) == storage_identity(row.initial)


def test_a_method_that_only_writes_is_no_reader_and_one_that_only_reads_no_writer() -> None:
    port = (TensorSignature("x", "float32", (1, 4)),)
    entries: list[EntryPoint] = [
        EntryPoint(name, frozenset({OTHER}), getattr(Memory, name), port, (OutputPort("y"),))
        for name in ("fill", "recall")
    ]
    program = Source(Model(Memory(), tuple(entries), Metadata(1, 1, 1))).capture().program
    row = program.state["memory"]
    assert (row.writers, row.readers, row.layout) == (("fill",), ("recall",), "any")


def test_a_weight_used_by_two_methods_is_stored_once(tiny_program: Program) -> None:
    weight = tiny_program.weights["blocks.0.up.weight"]
    assert weight.users == ("decode", "prefill")
    assert weight.nbytes == 64 * 32 * 4
    assert len({storage_identity(use.tensor) for use in weight.uses}) == 1


def test_a_tied_projection_is_an_alias_of_the_embedding(tiny_program: Program) -> None:
    (tied,) = [weight for weight in tiny_program.weights.values() if "embedding.weight" in weight.names]
    assert tied.names == ("embedding.weight", "head.weight")
    assert tied.users == ("decode", "prefill", "token_embedding")
    assert tied.nbytes == tiny.VOCABULARY * tiny.WIDTH * 4


def test_an_untied_projection_is_a_weight_of_its_own() -> None:
    weights = tiny.captured(tiny.tiny(layers=1, tied=False)).program.weights
    assert weights["embedding.weight"].users == ("decode", "token_embedding")
    assert weights["head.weight"].users == ("decode", "prefill")


def test_the_table_holds_every_parameter_of_the_module_and_nothing_else(tiny_program: Program) -> None:
    module = tiny.tiny().module
    assert sum(weight.nbytes for weight in tiny_program.weights.values()) == sum(
        parameter.numel() * parameter.element_size() for parameter in module.parameters()
    )


def test_two_values_under_one_name_are_two_weights(tiny_program: Program) -> None:
    name = "blocks.0.up.weight"
    decode = tiny_program.methods["decode"]
    other = with_tensors(decode, {name: nn.Parameter(decode.exported.state_dict[name].clone(), requires_grad=False)})
    program = tiny_program.with_methods({**tiny_program.methods, "decode": other})
    rows = {key: weight.users for key, weight in program.weights.items() if name in weight.names}
    assert len(rows) == 2
    assert set(rows.values()) == {("decode",), ("prefill",)}


def test_a_state_row_with_two_storages_is_refused_naming_both_methods(tiny_program: Program) -> None:
    decode = tiny_program.methods["decode"]
    other = with_tensors(decode, {KEYS: decode.exported.state_dict[KEYS].clone()})
    with pytest.raises(VerificationError, match=r"routed_attention\.cache\.keys.*prefill.*decode"):
        tiny_program.with_methods({**tiny_program.methods, "decode": other})


def test_the_tables_cannot_be_changed_in_place(tiny_program: Program) -> None:
    tables: list[Any] = [tiny_program.methods, tiny_program.state, tiny_program.weights]
    for table in tables:
        with pytest.raises(TypeError):
            table["other"] = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_program.metadata = Metadata(1, 1, 1)  # type: ignore[misc]


def test_dropping_a_method_leaves_the_old_program_whole(tiny_program: Program) -> None:
    smaller = tiny_program.with_methods({"decode": tiny_program.methods["decode"]})
    assert tiny_program.state[KEYS].writers == ("prefill", "decode")
    assert smaller.state[KEYS].writers == ("decode",)


def test_the_graph_shows_who_feeds_whom(tiny_program: Program) -> None:
    assert edges(tiny_program, "feeds") == {("method:token_embedding", "method:prefill")}
    ((_, _, data),) = [edge for edge in tiny_program.graph.edges(data=True) if edge[2]["kind"] == "feeds"]
    assert (data["output"], data["input"]) == ("embeds", "embeds")


def test_the_graph_shows_state_and_weights_of_each_method(tiny_program: Program) -> None:
    row = f"state:{KEYS}"
    assert {(row, "method:prefill"), (row, "method:decode")} <= edges(tiny_program, "reads")
    assert {("method:prefill", row), ("method:decode", row)} <= edges(tiny_program, "writes")
    assert ("weight:blocks.1.down.weight", "method:decode") in edges(tiny_program, "uses")
    assert not [edge for edge in edges(tiny_program, "reads") if edge[1] == "method:token_embedding"]


@pytest.mark.parametrize(("kind", "modality"), [("encoder", None), ("decode", "image"), ("guess", None)])
def test_a_role_that_does_not_exist_is_refused(kind: str, modality: str | None) -> None:
    with pytest.raises(ModelError, match="no role"):
        Role(kind, modality)


@pytest.mark.parametrize("role", [Role("encoder", "image"), Role("decode")])
def test_a_role_reads_back_what_it_prints(role: Role) -> None:
    assert Role.parse(str(role)) == role
