"""The public functions: `export` a model, `load` an artifact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final, overload

from triptych.errors import UsageError

if TYPE_CHECKING:
    from triptych.compiler.artifact import Artifact
    from triptych.compiler.model import Model
    from triptych.compiler.pipeline import Pipeline, PipelineLike
    from triptych.compiler.stages import Source
    from triptych.runtime.runner import Runner

DEFAULT_ABI: Final = "triptych"
ABIS: Final = (DEFAULT_ABI, "executorch-llm")
ABI_PASS: Final = "adopt-abi"
DEFAULT_TARGET: Final = "xnnpack"
DEFAULT_RECIPE: Final = "fp32"


def default_pipeline(max_context: int, recipe: str = DEFAULT_RECIPE) -> str:
    """Return the pipeline of a generative model.

    Before capture: quantize, give attention a cache, let the target choose its kernel. After it: look rotary positions
    up, compute in the order of axes that needs the fewest permutes, give the logits of the last position only.
    """
    quantize = "" if recipe == DEFAULT_RECIPE else f"quantize{{recipe={recipe}}},"
    source = f"{quantize}static-kv-cache{{max={max_context}}},swap-sdpa"
    return f"{source},capture,precompute-rope,remove-redundant-permutes,last-token-logits"


@overload
def export(
    model: str | Path | Model, *, max_context: int | None = None, progress: Callable[[str], None] | None = None
) -> Source: ...


@overload
def export(
    model: str | Path | Model,
    *,
    out: str | Path,
    target: str = DEFAULT_TARGET,
    recipe: str | None = None,
    pipeline: PipelineLike | None = None,
    max_context: int | None = None,
    abi: str | None = None,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Artifact: ...


def export(
    model: str | Path | Model,
    *,
    out: str | Path | None = None,
    target: str | None = None,
    recipe: str | None = None,
    pipeline: PipelineLike | None = None,
    max_context: int | None = None,
    abi: str | None = None,
    cache: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Source | Artifact:
    """Export a model: stage by stage, or with `out` all at once.

    Args:
        model: a folder with a Hugging Face checkpoint, or a described `Model`.
        out: folder of the artifact to write. Without it the first stage is returned, and the stages take the
            other choices: ``export(m).transform(…).quantize(…).capture().rewrite(…).lower(target).save(out)``.
        target: who runs the program: "xnnpack" (default), "portable", "eager", or a third party's.
        recipe: "fp32" (default) or "8da4w".
        pipeline: the passes, as text or as a `Pipeline`, in place of `default_pipeline`; it must contain
            "capture". A recipe in it (``quantize{recipe=…}``) excludes `recipe`.
        max_context: positions the program is built for; default: what the model allows, at most 2,048.
        abi: entry-point contract. "triptych" (default) is this package's own; a .pte of "executorch-llm" runs in the
            runners that ExecuTorch itself has for iOS, Android, C++ and Python (the pass ``adopt-abi`` comes last).
        cache: folder that keeps the program after each step, with `out` only. The next export goes on after the last
            step for which nothing has changed: model, passes, options, versions. It may be deleted at any time.
        progress: hears the name of each stage as it begins.

    Raises:
        UsageError: for an impossible option, before any work.
        ModelError, LoweringError, ArtifactError: as their names say; nothing is left half-written.
    """
    if out is None:
        given = {"target": target, "recipe": recipe, "pipeline": pipeline, "abi": abi, "cache": cache}
        useless = [name for name, value in given.items() if value is not None]
        if useless:
            raise UsageError(f"export without out= returns the first stage and ignores {', '.join(useless)}; add out=")
        return _source(model, max_context, progress)
    return _export_whole(
        model,
        Path(out),
        target=target or DEFAULT_TARGET,
        recipe=recipe,
        pipeline=pipeline,
        max_context=max_context,
        abi=abi,
        cache=None if cache is None else Path(cache),
        progress=progress,
    )


def _export_whole(
    model: str | Path | Model,
    out: Path,
    *,
    target: str,
    recipe: str | None,
    pipeline: PipelineLike | None,
    max_context: int | None,
    abi: str | None,
    cache: Path | None,
    progress: Callable[[str], None] | None,
) -> Artifact:
    from triptych.compiler.artifact import check_destination
    from triptych.compiler.pipeline import as_pipeline
    from triptych.compiler.quantize.recipes import check, find_recipe
    from triptych.compiler.stage_cache import StageCache, run
    from triptych.compiler.stages import recipe_of
    from triptych.compiler.targets.base import find_target

    if abi is not None and abi not in ABIS:
        raise UsageError(f"no ABI is called {abi!r}; known: {', '.join(ABIS)}")
    chosen_target = find_target(target)()
    chosen_recipe = find_recipe(recipe or DEFAULT_RECIPE)
    chosen = None if pipeline is None else _checked_pipeline(as_pipeline(pipeline).checked(), recipe, max_context)
    if chosen is not None:
        chosen = _with_abi(chosen, abi)
        chosen_recipe = recipe_of(chosen)
    chosen_target.check(chosen_recipe)
    check_destination(out)
    if cache is not None and cache.resolve().is_relative_to(out.resolve()):
        raise UsageError(f"the cache {cache} lies in {out}, which the artifact replaces; choose another folder for it")
    stage_cache = None if cache is None else StageCache(cache)
    source = _source(model, max_context, progress)
    check(source.model, chosen_recipe)
    if chosen is None:
        chosen = _with_abi(as_pipeline(default_pipeline(source.model.metadata.max_context, chosen_recipe.name)), abi)
    return run(source, chosen, stage_cache).lower(chosen_target).save(out)


def _with_abi(pipeline: Pipeline, abi: str | None) -> Pipeline:
    """Return the pipeline with the pass that adopts `abi`, last."""
    from triptych.compiler.pipeline import as_pipeline

    written = [str(vars(one)["abi"]) for one in pipeline.program if one.name == ABI_PASS]
    if written and abi is not None:
        raise UsageError(f"the pipeline adopts the ABI {written[0]} already; leave out the ABI {abi}")
    if abi is None or abi == DEFAULT_ABI:
        return pipeline
    return (pipeline + as_pipeline(f"{ABI_PASS}{{abi={abi}}}")).checked()


def _checked_pipeline(pipeline: Pipeline, recipe: str | None, max_context: int | None) -> Pipeline:
    """Return the pipeline with the quantization that `recipe` asks for."""
    from triptych.compiler.pipeline import as_pipeline
    from triptych.compiler.properties import QUANTIZED

    if not pipeline.captures:
        raise UsageError(f"pipeline '{pipeline}' has no 'capture'; put it between source and graph passes")
    if max_context is not None and any(vars(one).get("max") is not None for one in pipeline.source):
        raise UsageError("the pipeline sets the cache length (static-kv-cache{max=…}); leave out max_context")
    written = [str(vars(one)["recipe"]) for one in pipeline.source if QUANTIZED in one.ensures]
    if written and recipe is not None:
        raise UsageError(f"the pipeline quantizes already, with {written[0]}; leave out the recipe {recipe}")
    if written or (recipe or DEFAULT_RECIPE) == DEFAULT_RECIPE:
        return pipeline
    return as_pipeline(f"quantize{{recipe={recipe}}}") + pipeline


def _source(model: str | Path | Model, max_context: int | None, progress: Callable[[str], None] | None) -> Source:
    from triptych.compiler.model import Model
    from triptych.compiler.stages import Source, silent

    report = progress or silent
    if isinstance(model, Model):
        if max_context is not None:
            raise UsageError("a described model states its own max_context; leave the option out")
        return Source(model, report=report)
    from triptych.compiler.adapters.hugging_face import load as load_checkpoint

    report("load model")
    return Source(load_checkpoint(Path(model), max_context=max_context), report=report)


def load(folder: str | Path, *, threads: int | None = None) -> Runner:
    """Open an artifact for running; a `MultimodalRunner` where it sees images, else a `TextRunner`.

    `threads` is the number of threads of the engine, default: all cores. Raises `ArtifactError`.
    """
    from triptych.runtime.runner import Runner

    return Runner.from_pretrained(folder, threads=threads)
