"""`remove-dead-methods` keeps what generation needs, by values and by state, and says why."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.compiler import tiny
from triptych.compiler.manager import run_program
from triptych.compiler.model import EntryPoint, Model, OutputPort
from triptych.compiler.program import Program
from triptych.compiler.roles import OTHER, SCORE
from triptych.errors import PipelineError
from triptych.passes.remove_dead_methods import RemoveDeadMethods
from triptych.testing import check_pass, default_model


class Scored(tiny.TinyAttention):
    """Attention with a table that `probe` alone uses, and a note that other entry points leave and take."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(tiny.WIDTH, 7))
        self.register_buffer("note", torch.zeros(1))
        self.note: Tensor


def attention(module: Any) -> Any:
    return module.blocks[0].attention


def probe(module: Any, embeds: Tensor, start_pos: Tensor) -> Tensor:
    """An entry point outside of generation, with a weight of its own."""
    probed: Tensor = (embeds * start_pos) @ attention(module).table
    return probed


def with_score(model: Model) -> Model:
    (prefill,) = model.entry_points_with("prefill")
    score = dataclasses.replace(prefill, name="score", roles=frozenset({SCORE}))
    other = dataclasses.replace(
        prefill, name="probe", roles=frozenset({OTHER}), forward=probe, outputs=(OutputPort("probed"),)
    )
    embedding, *rest = model.entry_points
    embedding = dataclasses.replace(
        embedding, outputs=(OutputPort("embeds", ("prefill.embeds", "score.embeds", "probe.embeds")),)
    )
    return dataclasses.replace(model, entry_points=(embedding, *rest, score, other))


def scored() -> Model:
    return with_score(tiny.tiny(Scored()))


def run(model: Model, keep: str = "", passes: str = tiny.DEFAULT_PASSES) -> tuple[Program, Any]:
    after, (result,) = run_program(tiny.captured(model, passes).program, [RemoveDeadMethods(keep)])
    return after, result


def test_what_generation_does_not_need_goes() -> None:
    check = check_pass(RemoveDeadMethods(), scored(), matches=2)
    assert isinstance(check.before, Program)
    assert isinstance(check.after, Program)
    assert [match.where for match in check.result.matches] == ["score", "probe"]
    assert list(check.after.methods) == ["token_embedding", "prefill", "decode"]
    assert set(check.before.weights) - set(check.after.weights) == {"blocks.0.attention.table"}
    assert all("score" not in row.readers + row.writers for row in check.after.state.values())
    (embeds,) = check.after.methods["token_embedding"].outputs
    assert embeds.links == ("prefill.embeds",)


def test_methods_named_are_kept_with_what_feeds_them() -> None:
    after, result = run(scored(), "decode+score")
    assert list(after.methods) == ["token_embedding", "decode", "score"]
    assert [match.where for match in result.matches] == ["prefill", "probe"]


def test_a_model_that_needs_all_its_methods_stays() -> None:
    check_pass(RemoveDeadMethods(), default_model(), matches=0)


def test_the_last_decode_stays() -> None:
    after, result = run(scored(), "prefill")
    assert list(after.methods) == ["token_embedding", "prefill", "decode"]
    assert [str(one) for one in result.refusals] == [
        "decode: it is the last method with role decode, which generation cannot do without"
    ]


def test_one_of_two_decodes_may_go() -> None:
    model = scored()
    (decode,) = model.entry_points_with("decode")
    model = dataclasses.replace(
        model, entry_points=(*model.entry_points, dataclasses.replace(decode, name="decode_again"))
    )
    after, result = run(model, "prefill+decode_again")
    assert list(after.methods) == ["token_embedding", "prefill", "decode_again"]
    assert result.refusals == ()


def test_a_name_that_no_method_has_is_an_error() -> None:
    with pytest.raises(PipelineError, match="keep names 'encoder', which is no method; the program has token_embed"):
        run(scored(), "decode+encoder")


def with_note(writer: str, reader: str) -> Model:
    """Let the entry point `writer` leave a number that `reader` adds 0 times."""
    model = scored()
    entries: list[EntryPoint] = []
    for entry in model.entry_points:

        def forward(module: Any, *inputs: Tensor, entry: EntryPoint = entry) -> Any:
            result = entry.forward(module, *inputs)
            if entry.name == writer:
                attention(module).note.copy_(inputs[0].float().mean().reshape(1))
            return result + 0 * attention(module).note if entry.name == reader else result

        entries.append(dataclasses.replace(entry, forward=forward))
    return dataclasses.replace(model, entry_points=tuple(entries))


def test_who_alone_writes_what_decode_reads_stays() -> None:
    after, result = run(with_note("probe", "decode"), passes="")
    assert "probe" in after.methods
    assert "score" not in after.methods
    assert result.refusals == ()


def test_who_alone_reads_what_prefill_writes_stays() -> None:
    after, result = run(with_note("prefill", "probe"))
    assert "probe" in after.methods
    assert [str(one) for one in result.refusals] == [
        "probe: it reads the state blocks.0.attention.note, which prefill writes and no other kept method reads"
    ]


def test_a_program_without_generation_stays() -> None:
    model = scored()
    kept = tuple(one for one in model.entry_points if one.name in {"token_embedding", "probe"})
    program = tiny.captured(dataclasses.replace(model, entry_points=kept), "").program
    after, (result,) = run_program(program, [RemoveDeadMethods()])
    assert after is program
    assert "no method has a role of generation" in result.refusals[0].reason


def test_forgetting_what_feeds_prefill_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.passes.remove_dead_methods._needed", lambda program, wanted: set(wanted))
    with pytest.raises(KeyError, match="embeds"):
        check_pass(RemoveDeadMethods(), scored(), matches=3)
