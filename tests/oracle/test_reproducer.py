"""A reproducer runs by itself: it fails in a process of its own until the pass is mended, and is whole or absent."""

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final

import pytest
import torch

from tests.compiler import tiny
from tests.oracle.searches import guilty, pipeline_of
from tests.oracle.test_bisect import EditGelu
from tests.oracle.wrong_passes import CountSlots, SplitState
from triptych.compiler.bisect import Culprit
from triptych.compiler.failing_case import Case, load_program
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.pass_kinds import GraphPass, Pass
from triptych.compiler.pipeline import Pipeline, as_pipeline, build
from triptych.compiler.program import Program
from triptych.compiler.provenance import layer_of, source_line
from triptych.compiler.reproducer import write_reproducer
from triptych.compiler.shrinking import plan_of
from triptych.compiler.trace import CallTrace, Step, reference
from triptych.errors import ArtifactError, UsageError, VerificationError

SCALES: Final = """
class Scales(GraphPass):
    name: ClassVar[str] = "scales"
    def rewrite(self, editor, method, log):
        for node in editor.calls(torch.ops.aten.gelu.default):
            if log.match(node):
                with editor.graph.inserting_after(node):
                    scaled = editor.call(torch.ops.aten.mul.Tensor, node, FACTOR, like=node)
                node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
"""
RAISES: Final = """
class Raises(GraphPass):
    name: ClassVar[str] = "raises"
    def rewrite(self, editor, method, log):
        for node in editor.calls(torch.ops.aten.gelu.default):
            if log.match(node):
                raise ZeroDivisionError("no GELU today")
"""
SOURCE: Final = """
class ScalesAHead(SourceTransform):
    name: ClassVar[str] = "scales-a-head"
    def transform(self, model, log):
        head = model.module.get_output_embeddings()
        if log.match("lm_head"):
            model.module.set_output_embeddings(torch.nn.Linear(*reversed(head.weight.shape), bias=False))
            model.module.get_output_embeddings().weight = torch.nn.Parameter(head.weight.detach() * 1.01)
        return model
"""


def execute(script: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script)], cwd=cwd, capture_output=True, text=True, check=False)


@dataclass(frozen=True)
class Written:
    """A reproducer and what it was written from."""

    script: Path
    culprit: Culprit
    pipeline: Pipeline

    @property
    def folder(self) -> Path:
        return self.script.parent


@pytest.fixture(scope="module")
def written(tiny_model: Model, tiny_oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The reproducer of a pass that is wrong in decode, at the second layer."""
    pipeline = pipeline_of(CountSlots("decode", "blocks.1"))
    culprit = guilty(tiny_model, tiny_oracle, pipeline)
    folder = tmp_path_factory.mktemp("reproducers") / "count-slots"
    return Written(write_reproducer(culprit, tiny_oracle, folder, pipeline), culprit, pipeline)


# ---------------------------------------------------------------------------------------------------- the folder


def test_the_script_fails_anywhere_and_says_what_is_wrong(written: Written, tmp_path: Path) -> None:
    done = execute(written.script, tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("blocks.1.attention.routed_attention.cache.keys: relative ")
    assert "decode@" in done.stdout


def test_the_script_ends_well_once_the_pass_is_mended(written: Written, tmp_path: Path) -> None:
    folder = shutil.copytree(written.folder, tmp_path / "moved")
    source = folder / "guilty_pass.py"
    text = source.read_text(encoding="utf-8")
    assert text.count("self._write_at(editor, node, 1)") == 1
    source.write_text(text.replace("self._write_at(editor, node, 1)", "self._write_at(editor, node, 0)"))
    done = execute(folder / "reproduce.py", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "nothing fails any more\n", "")


def test_the_script_unpickles_nothing(written: Written) -> None:
    refusing = """
import pickle, runpy, sys, torch
from triptych.compiler import failing_case
class Refuse:
    def __init__(self, *_, **__): raise AssertionError("something was unpickled")
pickle.Unpickler = pickle._Unpickler = pickle.load = pickle.loads = torch.load = Refuse
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
runpy.run_path(sys.argv[1], run_name="__main__")
"""
    command = [sys.executable, "-c", refusing, str(written.script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    assert "relative" in done.stdout


def test_the_folder_holds_what_is_needed_and_no_more(written: Written) -> None:
    assert {path.name for path in written.folder.iterdir()} == {
        "reproduce.py",
        "guilty_pass.py",
        "pipeline.txt",
        "program",
        "decode.pt2",
        "trace.json",
        "trace.safetensors",
    }
    assert [path.name for path in written.folder.parent.iterdir()] == ["count-slots"]


def test_the_guilty_step_is_marked(written: Written) -> None:
    text = (written.folder / "pipeline.txt").read_text(encoding="utf-8")
    assert text.splitlines()[:6] == [
        "  static-kv-cache",
        "  swap-sdpa",
        "  capture",
        "  last-token-logits",
        "> count-slots{role=decode,layer=blocks.1}",
        "  legalize-aten",
    ]
    assert "guilty: count-slots (step 5), in decode, at update_cache_2, blocks.1, tiny.py:" in text


def test_the_guilty_method_opens_with_torch_alone(written: Written) -> None:
    method = torch.export.load(written.folder / "decode.pt2")
    assert isinstance(written.culprit.before, Program)
    before = written.culprit.before.methods["decode"].exported
    assert [str(node.target) for node in method.graph.nodes] == [str(node.target) for node in before.graph.nodes]


def test_the_program_keeps_layers_and_source_lines(written: Written) -> None:
    def places(program: Program) -> list[tuple[str, str | None, str | None]]:
        nodes = program.methods["decode"].exported.graph.nodes
        return [(node.name, layer_of(node), source_line(node)) for node in nodes if node.op == "call_function"]

    assert isinstance(written.culprit.before, Program)
    wanted = places(written.culprit.before)
    assert ("update_cache_2", "blocks.1") in {place[:2] for place in wanted}
    assert places(load_program(written.folder)) == wanted


def test_the_shortest_failing_conversation_is_kept_with_its_reference(
    written: Written, tiny_model: Model, tiny_oracle: Oracle
) -> None:
    case = Case.load(written.folder)
    (wanted,) = (one for one in tiny_oracle.references if one.trace.name == "random ids, prompt of 1")
    assert case.trace.name == wanted.trace.name
    assert case.trace.tokens.tolist() == wanted.trace.tokens.tolist()
    assert case.trace.steps == (Step("prefill", 1), Step("decode", 3))
    assert (case.tolerance.relative, case.tolerance.kl) == (1e-4, 1e-6)
    own = reference(tiny_model, case.trace)
    assert list(case.wanted.outputs) == list(own.outputs)
    assert set(case.wanted.state) == set(own.state)
    for label, value in {**own.outputs, **own.state}.items():
        torch.testing.assert_close({**case.wanted.outputs, **case.wanted.state}[label], value, rtol=0, atol=0)


def test_a_case_with_pictures_survives(tmp_path: Path) -> None:
    pictures = (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4).transpose(2, 3))
    trace = CallTrace("pictures", torch.tensor([1, 3, 3, 2]), (Step("prefill", 4),), pictures, 3)
    shared = torch.rand(2, 6)
    wanted = dataclasses.replace(
        reference(tiny.tiny(), tiny.trace(("prefill", 2))), outputs={"a": shared, "b": shared.t()}
    )
    Case(trace, wanted, Pass.tolerances["float32"], ("triptych.update_cache.default",)).save(tmp_path)
    loaded = Case.load(tmp_path)
    assert (loaded.trace.image_token_id, loaded.operators) == (3, ("triptych.update_cache.default",))
    for one, other in zip(loaded.trace.pixel_values, pictures, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(loaded.wanted.outputs["b"], shared.t())


# ---------------------------------------------------------------------------------------------------- kinds of culprits


@pytest.mark.slow
def test_a_pass_that_raises(
    tiny_model: Model, tiny_oracle: Oracle, module_of: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    pipeline = pipeline_of(module_of(RAISES).Raises())
    script = write_reproducer(guilty(tiny_model, tiny_oracle, pipeline), tiny_oracle, tmp_path / "out", pipeline)
    done = execute(script, tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("pass raises failed with ZeroDivisionError: no GELU today")


def test_a_program_pass_that_breaks_the_program(tiny_model: Model, tiny_oracle: Oracle, tmp_path: Path) -> None:
    """No method is guilty more than another, so each can be looked at; that the script fails was seen to already."""
    pipeline = pipeline_of(SplitState())
    script = write_reproducer(guilty(tiny_model, tiny_oracle, pipeline), tiny_oracle, tmp_path / "out", pipeline)
    assert {path.stem for path in script.parent.glob("*.pt2")} == {"token_embedding", "prefill", "decode"}
    case = Case.load(script.parent)
    assert len(case.trace.tokens) == min(len(one.trace.tokens) for one in tiny_oracle.references)
    assert case.failures(lambda: load_program(script.parent)) == ()


def test_a_pass_that_is_guilty_as_a_whole(
    tiny_model: Model, tiny_oracle: Oracle, module_of: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """Uniformity is a promise about all methods together; so the script holds nothing back."""
    text = SCALES.replace("FACTOR", "1.0").replace("if log", 'if "prefill" in map(str, method.roles) and log')
    pipeline = pipeline_of(module_of(f"{text}    uniform: ClassVar[bool] = True\n").Scales())
    script = write_reproducer(guilty(tiny_model, tiny_oracle, pipeline), tiny_oracle, tmp_path / "out", pipeline)
    assert "apply_step(guilty, before, None)" in script.read_text(encoding="utf-8")


@pytest.mark.slow
def test_after_quantizing_the_reference_is_the_quantized_model(
    tiny_model: Model, tiny_oracle: Oracle, module_of: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    """The script registers torchao's operators before it reads the program."""
    scales = module_of(SCALES.replace("FACTOR", "3.0")).Scales()
    pipeline = pipeline_of(scales, first="quantize{recipe=8da4w},static-kv-cache,swap-sdpa,capture")
    script = write_reproducer(guilty(tiny_model, tiny_oracle, pipeline), tiny_oracle, tmp_path / "out", pipeline)
    case = Case.load(script.parent)
    assert case.tolerance.relative >= 2e-2
    assert any(operator.startswith("torchao.") for operator in case.operators)
    assert case.failures(lambda: load_program(script.parent)) == ()
    done = execute(script, tmp_path)
    assert done.returncode == 1
    assert "relative" in done.stdout


@pytest.mark.slow
def test_a_source_transform_starts_from_its_checkpoint(
    demo_checkpoint: Path,
    demo_model: Model,
    demo_oracle: Oracle,
    module_of: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    pipeline = build([*as_pipeline("static-kv-cache").source, module_of(SOURCE).ScalesAHead()])
    oracle = demo_oracle.over(demo_oracle.plans[:2])
    culprit = guilty(demo_model, oracle, pipeline)
    assert culprit.match is not None
    assert culprit.match.where == "lm_head"
    with pytest.raises(UsageError, match=r"scales-a-head works on the model itself, .* as model_path"):
        write_reproducer(culprit, oracle, tmp_path / "out", pipeline)
    script = write_reproducer(culprit, oracle, tmp_path / "out", pipeline, model_path=demo_checkpoint)
    assert (
        f"load_model({str(demo_checkpoint)!r}, 'static-kv-cache', max_context=256, layers=None)" in script.read_text()
    )
    assert not (script.parent / "program").exists()
    done = execute(script, tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("prefill@1: relative 0.01")


def test_a_capture_is_given_with_the_checkpoint_only(tiny_model: Model, tiny_oracle: Oracle, tmp_path: Path) -> None:
    culprit = Culprit("capture", 2, "decode: relative 0.01", tiny_model)
    with pytest.raises(UsageError, match=r"capture works on the model itself, .* give the folder of its checkpoint"):
        write_reproducer(culprit, tiny_oracle, tmp_path / "out", as_pipeline("static-kv-cache,swap-sdpa,capture"))


# ---------------------------------------------------------------------------------------------------- refusals


def test_a_folder_that_is_no_reproducer_is_left_alone(written: Written, tiny_oracle: Oracle, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"exists and is no reproducer; choose another folder or empty it"):
        write_reproducer(written.culprit, tiny_oracle, tmp_path, written.pipeline)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_reproducer_is_replaced_whole(
    tiny_model: Model,
    tiny_oracle: Oracle,
    written: Written,
    module_of: Callable[[str], ModuleType],
    tmp_path: Path,
) -> None:
    folder = shutil.copytree(written.folder, tmp_path / "out")
    pipeline = pipeline_of(module_of(SCALES.replace("FACTOR", "1.01")).Scales())
    write_reproducer(guilty(tiny_model, tiny_oracle, pipeline), tiny_oracle, folder, pipeline)
    assert not (folder / "decode.pt2").exists()
    assert (folder / "prefill.pt2").is_file()
    assert "class Scales" in (folder / "guilty_pass.py").read_text(encoding="utf-8")


def test_what_does_not_fail_in_a_process_of_its_own_is_not_written(
    tiny_model: Model, tiny_oracle: Oracle, module_of: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    module = module_of(f"FACTOR = 1.0\n{SCALES}")
    pipeline = pipeline_of(module.Scales())
    module.FACTOR = 1.01
    culprit = guilty(tiny_model, tiny_oracle, pipeline)
    folder = tmp_path / "new" / "out"
    with pytest.raises(
        VerificationError, match=r"does not show the failure when it is run: nothing fails any more; pass"
    ):
        write_reproducer(culprit, tiny_oracle, folder, pipeline)
    assert list(folder.parent.iterdir()) == []


def test_a_pass_whose_file_needs_what_no_process_finds_is_not_written(
    tiny_model: Model, tiny_oracle: Oracle, tmp_path: Path
) -> None:
    """This pass stands in a test file, which imports others."""
    pipeline = pipeline_of(EditGelu())
    culprit = guilty(tiny_model, tiny_oracle, pipeline)
    with pytest.raises(VerificationError, match=r"No module named 'tests'; pass developer: .* by absolute names"):
        write_reproducer(culprit, tiny_oracle, tmp_path / "out", pipeline)
    assert list(tmp_path.iterdir()) == []


def test_a_class_inside_a_function_is_refused(tiny_model: Model, tiny_oracle: Oracle, tmp_path: Path) -> None:
    class Local(CountSlots):
        pass

    pipeline = pipeline_of(Local("decode", "blocks.1"))
    culprit = guilty(tiny_model, tiny_oracle, pipeline)
    with pytest.raises(
        UsageError, match=r"class of pass count-slots is defined inside a function, .* a file of its own"
    ):
        write_reproducer(culprit, tiny_oracle, tmp_path / "out", pipeline)


@dataclass(frozen=True)
class TakesAFunction(GraphPass):
    name: ClassVar[str] = "takes-a-function"
    function: Callable[[float], float] = abs

    def rewrite(self, editor: Any, method: Any, log: Any) -> None:
        EditGelu().rewrite(editor, method, log)


def test_an_option_that_no_script_can_spell_is_refused(tiny_model: Model, tiny_oracle: Oracle, tmp_path: Path) -> None:
    pipeline = pipeline_of(TakesAFunction())
    culprit = guilty(tiny_model, tiny_oracle, pipeline)
    with pytest.raises(UsageError, match=r"option function of pass takes-a-function is <built-in function abs>, which"):
        write_reproducer(culprit, tiny_oracle, tmp_path / "out", pipeline)


def test_another_oracle_than_the_one_that_found_it_is_refused(
    written: Written, tiny_model: Model, tmp_path: Path
) -> None:
    """The pass is wrong in decode; this oracle only prefills."""
    other = Oracle(tiny_model, [plan_of(tiny.trace(("prefill", 4)))])
    with pytest.raises(UsageError, match="no conversation fails after count-slots; give the oracle by which"):
        write_reproducer(written.culprit, other, tmp_path / "out", written.pipeline)
