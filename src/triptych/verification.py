"""`triptych verify`: does an artifact compute what the user's model computes?

Builds call traces from real text and pictures and from random token ids, plays them on the eager model and on
the artifact, and compares every output and the final state (parity, see `triptych.compiler.trace`).
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from triptych.compiler.model import Model
from triptych.compiler.pass_kinds import DEFAULT_TOLERANCES, Tolerance
from triptych.compiler.quantize.recipes import find_recipe
from triptych.compiler.stages import Source, silent
from triptych.compiler.trace import (
    CallTrace,
    Comparison,
    Sensitivity,
    Step,
    TraceOutputs,
    compare,
    perturbations,
    reference,
    replay,
    sensitivity,
)
from triptych.demo.scenes import random_scene, render
from triptych.errors import UsageError
from triptych.manifest import ImageSettings, Manifest
from triptych.runtime.images import preprocess
from triptych.runtime.loaders import load_runner
from triptych.runtime.method_runner import MethodRunner
from triptych.runtime.tokenizers import load_tokenizer

PROMPT_LENGTHS: Final = (1, 17, 300)
DEFAULT_TOKENS: Final = 16
DRAWS: Final = 8
QUANTIZED_FLOOR: Final = Tolerance(relative=2e-2, kl=1e-3)
NOISE: Final = 1e-6
NOISE_FACTOR: Final = 4.0

TEXT: Final = (
    "A ship left the harbour at dawn. Its captain had counted the crates twice: forty-two of tea, seven of "
    "porcelain, and one, unlabelled, that nobody would open. 'Keep it dry,' the merchant had said, and paid in "
    "silver. By noon the wind had turned; by evening the coast was a thin grey line behind them. The cook asked "
    "what was in the crate. The mate said books. The boy who slept beside it said that, some nights, it hummed. "
)


@dataclass(frozen=True)
class TraceReport:
    """The verdict on one trace.

    `against` is "fp32" or the artifact's own recipe in eager. `unseen` lists perturbations that moved the last
    logits too little for the comparison to mean anything.
    """

    trace: str
    against: str
    comparison: Comparison
    failures: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """True where everything lies within the tolerance and the comparison could see."""
        return not self.failures and not self.unseen


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
    noise permits; its KL from fp32 is reported, and bounded by `max_kl` where given. Raises `ArtifactError`,
    `ModelError`, or `UsageError` where no prompt fits.
    """
    manifest = Manifest.load(folder)
    manifest.check_files(folder)
    if manifest.vocab_size != model.metadata.vocab_size:
        raise UsageError(
            f"{folder} has a vocabulary of {manifest.vocab_size} and the model one of {model.metadata.vocab_size}; "
            "give the model the artifact was made from"
        )
    plans = make_plans(folder, manifest, tokens, prompt_lengths)
    recipe = find_recipe(manifest.recipe)
    float_tolerance = DEFAULT_TOLERANCES["float32"]
    own = model if recipe.is_float else Source(model).quantize(recipe.name).model
    reports: list[TraceReport] = []
    kls: list[float] = []
    with load_runner(folder, manifest) as runner:
        for plan in plans:
            report(plan.name)
            trace, wanted, seen = _visible_trace(plan, own, manifest)
            got, moved = _play(runner, manifest, trace)
            tolerance = float_tolerance if recipe.is_float else rounding_tolerance(own, trace, wanted)
            comparison = compare(trace, wanted, got, tolerance)
            unseen = tuple(_unseen([*seen, *moved]))
            reports.append(TraceReport(trace.name, recipe.name, comparison, comparison.failures(tolerance), unseen))
            from_float = comparison if own is model else compare(trace, reference(model, trace), got, float_tolerance)
            kls += from_float.kls
    return VerifyReport(str(folder), manifest.recipe, manifest.target, tuple(reports), statistics.fmean(kls), max_kl)


def rounding_tolerance(model: Model, trace: CallTrace, wanted: TraceOutputs) -> Tolerance:
    """Measure how far a quantized model's own rounding moves its outputs, and allow four times as much.

    An int8 activation on the edge of a rounding step falls to either side for a difference of one in a million, and
    layer after layer carries the step on; so two right implementations of one recipe agree only to within this
    noise. It is measured on the eager model with its token embeddings scaled by 1 + 1e-6.
    """
    (name,) = model.metadata.components["embedding"]
    embedding = model.module.get_submodule(name)
    handle = embedding.register_forward_hook(lambda _module, _inputs, output: output * (1 + NOISE))
    try:
        noisy = reference(model, trace)
    finally:
        handle.remove()
    noise = compare(trace, wanted, noisy, QUANTIZED_FLOOR)
    return Tolerance(
        relative=max(QUANTIZED_FLOOR.relative, NOISE_FACTOR * noise.worst_relative),
        kl=max(QUANTIZED_FLOOR.kl, NOISE_FACTOR * max(noise.kls, default=0.0)),
    )


def _visible_trace(
    plan: TracePlan, model: Model, manifest: Manifest
) -> tuple[CallTrace, TraceOutputs, tuple[Sensitivity, ...]]:
    """Draw inputs until the reference itself reacts to a changed input; the last draw stands where none does."""
    for seed in range(DRAWS):
        trace = plan.draw(seed)
        wanted = reference(model, trace)
        seen = sensitivity(wanted, [(one.name, reference(model, one)) for one in _changed(trace, manifest)])
        if not any(_unseen(seen)):
            break
    return trace, wanted, seen


def _unseen(moves: Sequence[Sensitivity]) -> Iterator[str]:
    for one in moves:
        if not one.sees(DEFAULT_TOLERANCES["float32"]):
            yield f"{one.trace}: the last logits moved by {one.moved:.2g} only"


def _play(runner: MethodRunner, manifest: Manifest, trace: CallTrace) -> tuple[TraceOutputs, tuple[Sensitivity, ...]]:
    methods = {role: name for name, method in manifest.methods.items() for role in method.roles}
    got = replay(runner, trace, methods)
    moved = [(f"artifact, {one.name}", replay(runner, one, methods)) for one in _changed(trace, manifest)]
    return got, sensitivity(got, moved)


def _changed(trace: CallTrace, manifest: Manifest) -> Iterator[CallTrace]:
    """Yield the perturbed traces in their shortest form: all but the last position prefilled."""
    for one in perturbations(trace, manifest.vocab_size):
        length = len(one.tokens)
        steps = (Step("prefill", length - 1), Step("decode", 1)) if length > 1 else (Step("prefill", 1),)
        yield dataclasses.replace(one, steps=steps)


@dataclass(frozen=True)
class TracePlan:
    """A conversation whose tokens are drawn from a seed."""

    name: str
    steps: tuple[Step, ...]
    tokens: Callable[[int], Tensor]
    pixel_values: tuple[Tensor, ...] = ()
    image_token_id: int | None = None

    def draw(self, seed: int) -> CallTrace:
        """Return the trace for one seed."""
        return CallTrace(self.name, self.tokens(seed), self.steps, self.pixel_values, self.image_token_id)


def make_plans(
    folder: Path, manifest: Manifest, tokens: int, prompt_lengths: Sequence[int] = PROMPT_LENGTHS
) -> list[TracePlan]:
    """Plan the traces of an artifact: text and random ids of each length, two prefills and a second turn, images."""
    fitting = [length for length in prompt_lengths if length + tokens <= manifest.max_context]
    if not fitting or tokens < 1:
        raise UsageError(
            f"{tokens} tokens after a prompt of {min(prompt_lengths)} do not fit the context of "
            f"{manifest.max_context}; decode between 1 and the context's length"
        )
    plans = []
    for length in fitting:
        steps = (Step("prefill", length), Step("decode", tokens))
        if manifest.tokenizer is not None:
            text = partial(_text_tokens, folder, manifest, length + tokens)
            plans.append(TracePlan(f"text, prompt of {length}", steps, text))
        drawn = partial(_random_tokens, manifest, length + tokens)
        plans.append(TracePlan(f"random ids, prompt of {length}", steps, drawn))
    turns = (Step("prefill", 9), Step("prefill", 8), Step("decode", 3), Step("prefill", 7), Step("decode", 3))
    length = sum(step.count for step in turns)
    if length <= manifest.max_context:
        plans.append(TracePlan("chunked prefill, second turn", turns, partial(_random_tokens, manifest, length)))
    if manifest.image is not None:
        plans += _image_plans(manifest, manifest.image)
    return plans


def _image_plans(manifest: Manifest, settings: ImageSettings) -> Iterator[TracePlan]:
    block = [*settings.prefix, *[settings.token_id] * settings.tokens, *settings.suffix]
    turn, answer = len(block) + 12, 6
    conversations = (
        ("one image", (1,)),
        ("two images", (2,)),
        ("image in a later turn", (1, 1)),
    )
    for name, images in conversations:
        steps: list[Step] = []
        starts: list[int] = []
        position = 0
        for count in images:
            starts += [position + 3 + index * len(block) for index in range(count)]
            steps += [Step("prefill", turn + (count - 1) * len(block)), Step("decode", answer)]
            position += steps[-2].count + answer
        if position <= manifest.max_context:
            tokens = partial(_tokens_with_images, manifest, position, tuple(starts), tuple(block))
            pictures = tuple(_pictures(manifest, settings, sum(images)))
            yield TracePlan(name, tuple(steps), tokens, pictures, settings.token_id)


def _tokens_with_images(
    manifest: Manifest, length: int, starts: tuple[int, ...], block: tuple[int, ...], seed: int
) -> Tensor:
    tokens = _random_tokens(manifest, length, seed)
    for start in starts:
        tokens[start : start + len(block)] = torch.tensor(block)
    return tokens


def _pictures(manifest: Manifest, settings: ImageSettings, count: int) -> Iterator[Tensor]:
    encoder = manifest.method_with_role("encoder(image)")
    assert encoder is not None
    port = manifest.methods[encoder].input("pixel_values")
    rng = random.Random(count)
    for _ in range(count):
        yield preprocess(render(random_scene(rng, test=True), rng, size=256), settings, port)


def _random_tokens(manifest: Manifest, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, manifest.vocab_size, (length,), generator=generator)
    if manifest.image is not None:
        tokens[tokens == manifest.image.token_id] = (manifest.image.token_id + 1) % manifest.vocab_size
    return tokens


def _text_tokens(folder: Path, manifest: Manifest, length: int, seed: int) -> Tensor:
    assert manifest.tokenizer is not None
    tokenizer = load_tokenizer(folder / manifest.tokenizer, bos_id=manifest.bos_id, eos_ids=manifest.eos_ids)
    ids = tokenizer.encode(TEXT * (2 + length // 40))
    return torch.tensor(ids[seed : seed + length])
