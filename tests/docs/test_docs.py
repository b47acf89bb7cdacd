"""The code in the documentation runs, and what the documentation lists exists."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.compiler.capture import capture
from triptych.compiler.manager import run_program
from triptych.compiler.model import EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.registry import pass_names
from triptych.compiler.roles import OTHER
from triptych.compiler.targets.base import target_names
from triptych.manifest import TensorSignature

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


def _blocks(name: str) -> list[str]:
    return BLOCK.findall((ROOT / name).read_text(encoding="utf-8"))


def test_entry_points_example_exports_and_verifies(tmp_path: Path) -> None:
    (block,) = _blocks("docs/entry-points.md")
    script = tmp_path / "example.py"
    script.write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny-artifact" / "triptych.json").is_file()


class _TwoRelus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(torch.relu(x - 1))


def test_pass_example_removes_one_of_two_relus() -> None:
    (block,) = _blocks("docs/passes.md")
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, "passes.md", "exec", dont_inherit=True), namespace)  # noqa: S102 (our own documentation)
    model = Model(
        _TwoRelus(),
        (
            EntryPoint(
                "main",
                frozenset({OTHER}),
                lambda module, x: module(x),
                (TensorSignature("x", "float32", (2, 3)),),
                (OutputPort("y"),),
            ),
        ),
        Metadata(max_context=1, model_max_context=1, vocab_size=1),
    )
    program, (result,) = run_program(capture(model), [namespace["DropDeadRelu"]()])
    exported = program.methods["main"].exported
    assert len(result.matches) == 1
    assert [node.target for node in exported.graph.nodes].count(torch.ops.aten.relu.default) == 1
    x = torch.randn(2, 3)
    assert torch.equal(exported.module()(x), model.module(x))


def test_every_pass_and_target_is_documented() -> None:
    passes = (ROOT / "docs/passes.md").read_text(encoding="utf-8")
    assert [name for name in pass_names() if f"| `{name}" not in passes] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in target_names() if f"`{name}`" not in readme] == []


def test_links_in_the_documentation_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            broken += [] if (page.parent / link).exists() else [f"{page.name}: {link}"]
    assert broken == []
