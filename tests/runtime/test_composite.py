import dataclasses

import pytest
import torch

from triptych.errors import ArtifactError
from triptych.manifest import Manifest, ProgramFile
from triptych.runtime.composite import CompositeRunner
from triptych.runtime.fake import FILE, STATE_ROW, FakeRunner, fake_manifest
from triptych.runtime.method_runner import MethodRunner

OTHER = "other.program"


def split() -> tuple[Manifest, dict[str, MethodRunner]]:
    """Decode and the state's owner in one program file, the other methods in a second."""
    whole = fake_manifest()
    rest = tuple(name for name in whole.methods if name != "decode")
    programs = (ProgramFile(FILE, "fake", ("decode",)), ProgramFile(OTHER, "fake", rest))
    manifest = dataclasses.replace(whole, programs=programs)

    def part(names: tuple[str, ...]) -> FakeRunner:
        return FakeRunner(dataclasses.replace(whole, methods={name: whole.methods[name] for name in names}))

    return manifest, {FILE: part(("decode",)), OTHER: part(rest)}


def test_methods_go_to_their_engine_over_one_state() -> None:
    manifest, runners = split()
    both, single = CompositeRunner(manifest, runners), FakeRunner()
    assert both.methods == single.methods
    assert both.capabilities.engines == ("fake",)
    embeds = torch.randn(1, 3, 8)
    for runner in (both, single):
        runner.run("prefill", embeds=embeds, start_pos=torch.tensor([0]))
    step = {"tokens": torch.tensor([[7]]), "start_pos": torch.tensor([3])}
    assert torch.equal(both.run("decode", **step)["logits"], single.run("decode", **step)["logits"])
    assert both.state[STATE_ROW] is runners[FILE].state[STATE_ROW] is runners[OTHER].state[STATE_ROW]
    both.reset_state()
    assert not runners[OTHER].state[STATE_ROW].any()


def test_every_row_has_one_owner_and_every_method_one_runner() -> None:
    manifest, runners = split()
    row = dataclasses.replace(manifest.state[0], owner="nobody")
    with pytest.raises(ArtifactError, match="belongs to nobody, which is no program file"):
        CompositeRunner(dataclasses.replace(manifest, state=(row,)), runners)
    with pytest.raises(ArtifactError, match="no program file holds the method"):
        CompositeRunner(manifest, {FILE: runners[FILE]})
    with pytest.raises(ArtifactError, match=r"method 'decode' is in other\.program and in another"):
        CompositeRunner(manifest, {FILE: runners[FILE], OTHER: FakeRunner()})
