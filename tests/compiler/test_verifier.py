"""Each kind of broken program is refused, with the place named."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from triptych.compiler.editing import copy_graph_module, rebuild
from triptych.compiler.program import Method, Program
from triptych.compiler.roles import Role
from triptych.compiler.verifier import verify
from triptych.errors import VerificationError
from triptych.manifest import DynamicDim, ImageSettings

Broken = Callable[[Program], Program]


def _method(name: str, change: Callable[[Method], Method]) -> Broken:
    return lambda program: dataclasses.replace(
        program, methods={**program.methods, name: change(program.methods[name])}
    )


def _input(method_name: str, port_name: str, /, **changes: Any) -> Broken:
    return _method(
        method_name,
        lambda method: dataclasses.replace(
            method,
            inputs=tuple(
                dataclasses.replace(port, **changes) if port.name == port_name else port for port in method.inputs
            ),
        ),
    )


def _output(method_name: str, /, **changes: Any) -> Broken:
    return _method(
        method_name,
        lambda method: dataclasses.replace(method, outputs=(dataclasses.replace(method.outputs[0], **changes),)),
    )


def _metadata(**changes: Any) -> Broken:
    return lambda program: dataclasses.replace(program, metadata=dataclasses.replace(program.metadata, **changes))


def _state(change: Callable[[Program, list[Any]], dict[str, Any]]) -> Broken:
    """Change the first row of the table."""

    def broken(program: Program) -> Program:
        rows = list(program.state.values())
        first = dataclasses.replace(rows[0], **change(program, rows))
        return dataclasses.replace(program, state={**program.state, first.name: first})

    return broken


def _use_before_definition(method: Method) -> Method:
    exported = rebuild(method.exported, copy_graph_module(method.exported))
    first = next(node for node in exported.graph.nodes if node.op == "call_function" and node.users)
    exported.graph.output_node().prepend(first)
    return dataclasses.replace(method, exported=exported)


IMAGE = ImageSettings("<image>", 3, 5, (8, 8), 3, None, None, None, None)
LIMITED = DynamicDim("S", 1, 12)
BROKEN: dict[str, tuple[Broken, str]] = {
    "link of another dtype": (
        _output("token_embedding", dtype="float16"),
        r"token_embedding.embeds → prefill.embeds: float16 is produced, float32 is taken",
    ),
    "link of another width": (
        _output("token_embedding", shape=(1, DynamicDim("S", 1, 24), 31)),
        r"token_embedding.embeds → prefill.embeds: last dimension 31 is produced, 32 is taken",
    ),
    "link of another dynamic range": (
        _output("token_embedding", shape=(1, LIMITED, 32)),
        r"token_embedding.embeds → prefill.embeds: the dynamic ranges end at 12 and 24",
    ),
    "link with more rows than are taken": (
        _output("token_embedding", shape=(1, 25, 32)),
        r"up to 25 rows are produced, at most 24 are taken",
    ),
    "link to a method that is not there": (
        _input("prefill", "embeds", links=("nobody.embeds",)),
        r"prefill.embeds comes from nobody.embeds, which does not exist",
    ),
    "link to an output that is not there": (
        _input("prefill", "embeds", links=("token_embedding.rows",)),
        r"prefill.embeds comes from token_embedding.rows, which does not exist",
    ),
    "input of another dtype than the graph": (
        _input("decode", "tokens", dtype="int32"),
        r"decode.tokens is int64 in the graph and int32 in its signature",
    ),
    "input of another size than the graph": (
        _input("decode", "tokens", shape=(1, 2)),
        r"decode.tokens has shape \[1, 1\] in the graph and \[1, 2\] in its signature",
    ),
    "fixed input that the graph takes dynamic": (
        _input("token_embedding", "tokens", shape=(1, 8)),
        r"token_embedding.tokens has shape",
    ),
    "input of another name": (
        _input("decode", "start_pos", name="position"),
        r"decode: takes \['tokens', 'start_pos'\], its signature says \['tokens', 'position'\]",
    ),
    "output of another dtype than the graph": (_output("decode", dtype="float16"), r"decode.logits is float32 in"),
    "output of another size than the graph": (_output("decode", shape=(2, 48)), r"decode.logits has shape"),
    "a value used before it is computed": (
        _method("decode", _use_before_definition),
        r"decode: .*used before it has been defined",
    ),
    "two state rows over one storage": (
        _state(lambda program, rows: {"initial": rows[1].initial}),
        r"state rows .*cache\.\w+ and .*cache\.\w+ share one storage",
    ),
    "a state row over a weight": (
        _state(lambda program, rows: {"initial": program.weights["norm.weight"].uses[0].tensor}),
        r"cache\.keys shares its storage with the weight norm\.weight",
    ),
    "a state row nobody reads": (
        _state(lambda program, rows: {"readers": ()}),
        r"cache\.keys is written and never read",
    ),
    "an EOS id outside the vocabulary": (_metadata(eos_ids=(1, 48)), r"EOS id 48 is outside the vocabulary of 48"),
    "a negative EOS id": (_metadata(eos_ids=(-1,)), r"EOS id -1 is outside"),
    "a context longer than the model's": (_metadata(max_context=25), r"max_context is 25, the model allows 1 to 24"),
    "a cache longer than the context": (_metadata(max_context=12), r"has 24 slots for a context of 12"),
    "another vocabulary than the logits": (
        _metadata(vocab_size=47),
        r"prefill: role prefill needs an output 'logits' over 47 tokens",
    ),
    "decode without logits": (_output("decode", name="scores"), r"decode: role decode needs an output 'logits'"),
    "an encoder that gives another number of embeddings": (
        lambda program: _metadata(image=IMAGE)(
            _method(
                "token_embedding", lambda one: dataclasses.replace(one, roles=frozenset({Role("encoder", "image")}))
            )(program)
        ),
        r"token_embedding: gives .* the image settings say 5",
    ),
}


def test_a_whole_program_is_accepted(tiny_program: Program) -> None:
    verify(tiny_program)


@pytest.mark.parametrize(("broken", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_the_verifier_refuses(tiny_program: Program, broken: Broken, message: str) -> None:
    with pytest.raises(VerificationError) as caught:
        verify(broken(tiny_program))
    assert re.search(message, str(caught.value)), str(caught.value)


def test_everything_wrong_is_listed_at_once(tiny_program: Program) -> None:
    broken = _metadata(eos_ids=(99,))(_input("decode", "tokens", dtype="int32")(tiny_program))
    with pytest.raises(VerificationError) as caught:
        verify(broken)
    assert "EOS id 99" in str(caught.value)
    assert "decode.tokens is int64" in str(caught.value)
