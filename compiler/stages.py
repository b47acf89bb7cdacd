"""The stages of an export: each offers what is legal next, and none changes another.

``Source.transform(…).quantize(…).capture()`` → ``Captured.rewrite(…)`` → ``.lower(…)`` → ``Lowered.save(…)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triptych.compiler import artifact, manager, storage
from triptych.compiler.artifact import Artifact
from triptych.compiler.continuation import check_continuation
from triptych.compiler.manager import Instrument, PassResult
from triptych.compiler.model import Model
from triptych.compiler.pipeline import Pipeline, PipelineLike, as_pipeline
from triptych.compiler.program import Program
from triptych.compiler.properties import QUANTIZED
from triptych.compiler.quantize.recipes import FP32, Recipe, check, find_recipe
from triptych.compiler.targets.base import Emission, Target, find_target
from triptych.errors import PipelineError
from triptych.manifest import Manifest

Report = Callable[[str], None]


def silent(stage: str) -> None:
    """Report to nobody."""


@dataclass(frozen=True)
class Source:
    """A described model before capture.

    `pipeline` is what was done so far and `results` tells what each pass did; `report` hears stage names and
    `instruments` watch the passes.
    """

    model: Model
    pipeline: Pipeline = field(default_factory=Pipeline)
    results: tuple[PassResult, ...] = ()
    report: Report = field(default=silent, compare=False)
    instruments: tuple[Instrument, ...] = field(default=(), compare=False)

    @property
    def recipe(self) -> Recipe:
        """The recipe that the passes so far have carried out."""
        return recipe_of(self.pipeline)

    def transform(self, pipeline: PipelineLike) -> Source:
        """Run source transforms, such as ``static-kv-cache{max=512},swap-sdpa``; raises `PipelineError`."""
        added = as_pipeline(pipeline)
        if added.captures or added.program:
            raise PipelineError(f"'{added}' goes beyond capture; call capture() and rewrite() for the rest")
        combined = (self.pipeline + added).checked()
        model, results = manager.run_source(self.model, added.source, self.report, self.instruments)
        return dataclasses.replace(self, model=model, pipeline=combined, results=(*self.results, *results))

    def quantize(self, recipe: str) -> Source:
        """Quantize by the recipe of that name; raises `RecipeError` naming a layer it cannot take."""
        chosen = find_recipe(recipe)
        check(self.model, chosen)
        return self if chosen.is_float else self.transform(f"quantize{{recipe={recipe}}}")

    def capture(self) -> Captured:
        """Export every entry point; raises `ModelError` naming the one that does not export."""
        report = self.report
        program = manager.run_capture(self.model, self.pipeline.source, lambda name: report(f"capture {name}"))
        return Captured(
            program,
            self.model.tokenizer_file,
            self.pipeline + Pipeline(captures=True),
            self.results,
            self.report,
            self.instruments,
        )


def recipe_of(pipeline: Pipeline) -> Recipe:
    """Return the recipe that a pipeline carries out."""
    names = [str(vars(one)["recipe"]) for one in pipeline.source if QUANTIZED in one.ensures]
    return find_recipe(names[-1]) if names else FP32


@dataclass(frozen=True)
class Captured:
    """A program, ready for graph and program passes."""

    program: Program
    tokenizer_file: Path | None
    pipeline: Pipeline
    results: tuple[PassResult, ...]
    report: Report = field(default=silent, compare=False)
    instruments: tuple[Instrument, ...] = field(default=(), compare=False)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the model that was captured."""
        return recipe_of(self.pipeline)

    def rewrite(self, pipeline: PipelineLike) -> Captured:
        """Run graph and program passes, such as ``last-token-logits``; raises `PipelineError`."""
        added = as_pipeline(pipeline)
        combined = (self.pipeline + added).checked()
        program, results = manager.run_program(self.program, added.program, self.report, self.instruments)
        return dataclasses.replace(self, program=program, pipeline=combined, results=(*self.results, *results))

    def save_program(self, folder: Path) -> None:
        """Write the program as graphs, one file of storages and tables; `triptych inspect` reads it."""
        storage.save(self.program, folder)

    def lower(self, target: str | Target, **options: Any) -> Lowered:
        """Legalize and emit for a target, by name with its options or as an object.

        Raises `RecipeError` for a recipe the target cannot lower, `ModelError` where decode does not go on from
        prefill, and `LoweringError` where emission fails.
        """
        chosen = find_target(target)(**options) if isinstance(target, str) else target
        chosen.check(self.recipe)
        self.report("check that decode goes on from prefill")
        check_continuation(self.program, quantized=not self.recipe.is_float)
        legalized = self.rewrite(chosen.pipeline())
        manifest = artifact.describe(
            legalized.program,
            chosen,
            recipe=self.recipe.name,
            pipeline=str(self.pipeline),
            has_tokenizer=self.tokenizer_file is not None,
        )
        emission = chosen.emit(legalized.program, manifest, self.report)
        return Lowered(legalized.program, emission, manifest, self.tokenizer_file, legalized.results, self.report)


@dataclass(frozen=True)
class Lowered:
    """An emitted program, not yet on disk."""

    program: Program
    emission: Emission
    manifest: Manifest
    tokenizer_file: Path | None
    results: tuple[PassResult, ...]
    report: Report = field(default=silent, compare=False)

    def save(self, folder: str | Path) -> Artifact:
        """Write the artifact; the folder is replaced in one step, and only an artifact may be replaced."""
        self.report("write")
        return artifact.write(Path(folder), self.emission, self.manifest, self.program, self.tokenizer_file)
