"""`triptych verify`: does an artifact compute what the user's model computes?

Builds call traces from real text and pictures and from random token ids, plays them on the eager model and on
the artifact, and compares every output and the final state (parity, see `triptych.compiler.oracle`).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle, TraceReport, wider
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES, Tolerance
from triptych.compiler.pipeline import as_pipeline
from triptych.compiler.quantize.recipes import find_recipe
from triptych.compiler.stages import Source, silent
from triptych.compiler.trace import compare, reference
from triptych.compiler.trace_plans import PROMPT_LENGTHS, Pictures, Subject, make_plans
from triptych.demo.scenes import random_scene, render
from triptych.errors import PipelineError, UsageError
from triptych.manifest import Manifest, token_ids
from triptych.runtime.images import preprocess
from triptych.runtime.loaders import load_runner

DEFAULT_TOKENS: Final = 16


@dataclass(frozen=True)
class VerifyReport:
    """All traces of one artifact; `kl_fp32` is the mean KL of its logits from the unquantized model, in nats."""

    artifact: str
    recipe: str
    target: str
    traces: tuple[TraceReport, ...]
    kl_fp32: float
    max_kl: float | None

    @property
    def passed(self) -> bool:
        """True where every trace passed and the KL bound holds."""
        return all(trace.passed for trace in self.traces) and (self.max_kl is None or self.kl_fp32 <= self.max_kl)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "artifact": self.artifact,
            "target": self.target,
            "recipe": self.recipe,
            "passed": self.passed,
            "mean_kl_fp32": self.kl_fp32,
            "max_kl": self.max_kl,
            "traces": [
                {
                    "trace": one.trace,
                    "against": one.against,
                    "passed": one.passed,
                    "worst_relative": one.comparison.worst_relative,
                    "max_kl": max(one.comparison.kls, default=0.0),
                    "compared_outputs": len(one.comparison.outputs),
                    "compared_state_rows": len(one.comparison.state),
                    "greedy_mismatches": sum(d.greedy is False and not d.near_tie for d in one.comparison.outputs),
                    "near_ties": sum(d.near_tie for d in one.comparison.outputs),
                    "failures": list(one.failures),
                    "unseen_perturbations": list(one.unseen),
                }
                for one in self.traces
            ],
        }


def verify(
    folder: Path,
    model: Model,
    *,
    tokens: int = DEFAULT_TOKENS,
    max_kl: float | None = None,
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS,
    report: Callable[[str], None] = silent,
) -> VerifyReport:
    """Compare the artifact in `folder` with `model`, the user's own.

    `tokens` positions are decoded after each prompt; prompts that do not fit the artifact's context are left
    out. A quantized artifact is held to the same recipe in eager, as tightly as that recipe's own rounding
    noise permits; its KL from fp32 is reported, and bounded by `max_kl` where given. Passes of its pipeline that
    declare a wider tolerance are granted it. Raises `ArtifactError`,
    `ModelError`, or `UsageError` where no prompt fits.
    """
    manifest = Manifest.load(folder)
    manifest.check_files(folder)
    if manifest.vocab_size != model.metadata.vocab_size:
        raise UsageError(
            f"{folder} has a vocabulary of {manifest.vocab_size} and the model one of {model.metadata.vocab_size}; "
            "give the model the artifact was made from"
        )
    plans = make_plans(_subject(folder, manifest), tokens, prompt_lengths)
    recipe = find_recipe(manifest.recipe)
    own = model if recipe.is_float else Source(model).quantize(recipe.name).model
    oracle = Oracle(own, plans, recipe=recipe.name, quantized=not recipe.is_float).within(manifest.kept_tokens)
    methods = {role: name for name, method in manifest.methods.items() for role in method.roles}
    with load_runner(folder, manifest) as runner:
        reports = tuple(oracle.judge(runner, methods, declared=_declared(manifest), perturbed=True, report=report))
    from_float = [one.comparison for one in reports]
    if not recipe.is_float:
        report("compare with the fp32 model")
        tolerance = DEFAULT_TOLERANCES["float32"]
        kept = None if manifest.kept_tokens is None else torch.tensor(token_ids(manifest.kept_tokens))
        from_float = [
            compare(one.trace, reference(model, one.trace), judged.got, tolerance, kept)
            for one, judged in zip(oracle.references, reports, strict=True)
        ]
    kl = statistics.fmean(kl for one in from_float for kl in one.kls)
    return VerifyReport(str(folder), manifest.recipe, manifest.target, reports, kl, max_kl)


def _declared(manifest: Manifest) -> Tolerance | None:
    """Return the widest tolerance that a pass of the artifact's pipeline declares; None where it cannot be read."""
    try:
        passes = as_pipeline(manifest.pipeline).passes
    except PipelineError:
        return None  # a pass that is not installed here: the artifact is held to the tightest
    declared: Tolerance | None = None
    for one in passes:
        declared = wider(one.tolerances["float32"], declared)
    return declared


def _subject(folder: Path, manifest: Manifest) -> Subject:
    return Subject(
        manifest.vocab_size,
        manifest.max_context,
        folder / manifest.tokenizer if manifest.tokenizer is not None else None,
        manifest.image,
        _scenes(manifest),
    )


def _scenes(manifest: Manifest) -> Pictures | None:
    """Return a source of pictures of coloured shapes, preprocessed as the manifest says."""
    settings, encoder = manifest.image, manifest.method_with_role("encoder(image)")
    if settings is None or encoder is None:
        return None
    port = manifest.methods[encoder].input("pixel_values")

    def pictures(count: int) -> tuple[Tensor, ...]:
        rng = random.Random(count)
        scenes = [random_scene(rng, test=True) for _ in range(count)]
        return tuple(preprocess(render(scene, rng, size=256), settings, port) for scene in scenes)

    return pictures
