import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from triptych.errors import ArtifactError, RunError
from triptych.manifest import DynamicDim, MethodSignature, TensorSignature
from triptych.runtime.fake import STATE_ROW, WIDTH, FakeRunner, fake_manifest
from triptych.runtime.signatures import check_inputs
from triptych.runtime.state import check_rows, restore_rows

START = torch.tensor([0])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"embeds": torch.zeros(1, 2, WIDTH)}, "takes the inputs embeds, start_pos; it got embeds"),
        ({"embeds": torch.zeros(1, 2, WIDTH), "start_pos": START, "mask": START}, "it got embeds, start_pos, mask"),
        (
            {"embeds": torch.zeros(1, 2, WIDTH).half(), "start_pos": START},
            "dtype torch.float16, expected torch.float32",
        ),
        ({"embeds": torch.zeros(1, 65, WIDTH), "start_pos": START}, r"\[1, 65, 8\], expected \[1, S=1..64, 8\]"),
        ({"embeds": torch.zeros(1, 0, WIDTH), "start_pos": START}, r"\[1, 0, 8\], expected"),
        ({"embeds": torch.zeros(2, WIDTH), "start_pos": START}, r"\[2, 8\], expected"),
        ({"embeds": [1.0], "start_pos": START}, "is a list, expected a torch.Tensor"),
    ],
)
def test_run_refuses_wrong_inputs(tensors: dict[str, torch.Tensor], message: str) -> None:
    runner = FakeRunner()
    with pytest.raises(RunError, match=message):
        runner.run("prefill", **tensors)
    assert runner.calls == []


def test_dimensions_of_one_name_must_agree() -> None:
    dim = DynamicDim("S", 1, 9)
    ports = tuple(TensorSignature(name, "float32", (1, dim)) for name in "ab")
    signature = MethodSignature((), ports, ())
    equal = {"b": torch.zeros(1, 3), "a": torch.ones(1, 3)}
    assert [tensor.sum().item() for tensor in check_inputs("m", signature, equal)] == [3, 0]  # in signature order
    with pytest.raises(RunError, match="dimension S is 3 in a and 4 in b"):
        check_inputs("m", signature, {"a": torch.zeros(1, 3), "b": torch.zeros(1, 4)})


def test_unknown_method_and_closed_runner() -> None:
    runner = FakeRunner()
    with pytest.raises(RunError, match="no method 'encode'; this runner has decode"):
        runner.run("encode")
    with runner:
        pass
    runner.close()
    with pytest.raises(RunError, match="closed"):
        runner.run("token_embedding", tokens=torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(RunError, match="closed"):
        runner.reset_state()


def test_state_is_live_and_reset_restores_it() -> None:
    runner = FakeRunner()
    token = torch.tensor([[5]])
    first = runner.run("decode", tokens=token, start_pos=torch.tensor([1]))["logits"]
    runner.state[STATE_ROW][0, 0] = 1.0
    assert not torch.equal(runner.run("decode", tokens=token, start_pos=torch.tensor([1]))["logits"], first)
    runner.reset_state()
    assert not runner.state[STATE_ROW].any()
    assert torch.equal(runner.run("decode", tokens=token, start_pos=torch.tensor([1]))["logits"], first)


def test_partial_reset_touches_used_slots_only() -> None:
    runner = FakeRunner()
    runner.state[STATE_ROW].fill_(1.0)
    runner.reset_state(used=3)
    assert not runner.state[STATE_ROW][0, :3].any()
    assert runner.state[STATE_ROW][0, 3:].all()


def test_initial_values_from_file(tmp_path: Path) -> None:
    row = dataclasses.replace(fake_manifest().state[0], initial="file")
    values = torch.randn(row.shape)
    save_file({row.name: values}, tmp_path / "state.safetensors")
    state = {row.name: torch.zeros(row.shape)}
    restore_rows(state, [row], tmp_path, used=2)
    assert torch.equal(state[row.name][0, :2], values[0, :2])
    assert not state[row.name][0, 2:].any()
    restore_rows(state, [row], tmp_path)
    assert torch.equal(state[row.name], values)
    with pytest.raises(ArtifactError, match="gives no initial value"):
        restore_rows(state, [row], tmp_path / "absent")


def test_state_must_match_the_manifest() -> None:
    row = fake_manifest().state[0]
    with pytest.raises(ArtifactError, match=r"no state row model\.cache"):
        check_rows({}, [row], "program")
    with pytest.raises(ArtifactError, match=r"is torch.float16 \[1\], the manifest says torch.float32"):
        check_rows({row.name: torch.zeros(1, dtype=torch.float16)}, [row], "program")
