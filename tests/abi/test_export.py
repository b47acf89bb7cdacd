"""`export(abi=…)` and `triptych export --abi`: which contract, over which target, and what cannot be meant."""

import subprocess
import sys
from pathlib import Path

import pytest

import triptych
from tests.abi.models import greedy, tokens_of
from triptych.compiler.model import Model
from triptych.errors import PipelineError, UsageError
from triptych.inspection import inspect
from triptych.manifest import Manifest
from triptych.verification import verify

PIPELINE = "static-kv-cache,swap-sdpa,capture,last-token-logits"


def test_the_default_abi_is_our_own(tiny_model: Model, tmp_path: Path) -> None:
    for given in ({}, {"abi": "triptych"}):
        artifact = triptych.export(tiny_model, out=tmp_path / "artifact", target="eager", **given)
        assert artifact.manifest.abi == "triptych/1"
        assert set(artifact.manifest.methods) == {"token_embedding", "prefill", "decode"}


@pytest.mark.parametrize("pipeline", [None, PIPELINE], ids=["default", "own"])
def test_the_abi_is_the_last_pass_of_the_pipeline(tiny_model: Model, tmp_path: Path, pipeline: str | None) -> None:
    out = tmp_path / "artifact"
    manifest = triptych.export(tiny_model, out=out, target="eager", pipeline=pipeline, abi="executorch-llm").manifest
    assert manifest.abi == "executorch-llm/1"
    assert manifest.pipeline.endswith("last-token-logits,adopt-abi{abi=executorch-llm}")
    assert {name: method.roles for name, method in manifest.methods.items()} == {"forward": ("decode", "prefill")}
    assert verify(out, tiny_model, tokens=4).passed
    expected = greedy(tiny_model, tokens_of(tiny_model, "abcdefghijklmnop"))
    with triptych.load(out) as runner:
        assert list(runner.generate("abcdefghijklmnop", max_new_tokens=len(expected)).tokens) == expected


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"abi": "c89"}, UsageError, "no ABI is called 'c89'; known: triptych, executorch-llm"),
        (
            {"abi": "executorch-llm", "pipeline": f"{PIPELINE},adopt-abi{{abi=executorch-llm}}"},
            UsageError,
            "the pipeline adopts the ABI executorch-llm already; leave out the ABI executorch-llm",
        ),
        (
            {"abi": "executorch-llm", "pipeline": "capture"},
            PipelineError,
            "adopt-abi requires kv-cache, which no earlier pass",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_before_any_work(
    tmp_path: Path, options: dict[str, str], kind: type[UsageError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        triptych.export(tmp_path / "no model here", out=tmp_path / "artifact", **options)  # type: ignore[call-overload]


@pytest.mark.slow
def test_the_command_line_exports_and_inspects(demo_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"

    def command(*arguments: object) -> str:
        words = [sys.executable, "-m", "triptych", *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout

    command(
        "export", demo_checkpoint, "--out", out, "--target", "eager", "--max-context", 64, "--abi", "executorch-llm"
    )
    assert set(Manifest.load(out).methods) == {"vision_encoder", "token_embedding", "text_decoder"}
    assert "  abi: executorch-llm/1\n" in command("inspect", out)
    data = inspect(out)
    assert (data["abi"], data["methods"]["text_decoder"]["roles"]) == ("executorch-llm/1", ["decode", "prefill"])
