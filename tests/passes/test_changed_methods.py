"""Artifacts whose methods a pass has changed generate what the unchanged ones generate, text and pictures alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import triptych
from tests.passes.text_checkpoint import CONTEXT, ids_of, write_checkpoint
from triptych.compiler.adapters.hugging_face import load as load_checkpoint
from triptych.compiler.model import Model
from triptych.compiler.targets.pte import read_pte
from triptych.errors import RunError, UsageError
from triptych.runtime.runner import Runner
from triptych.verification import verify

BASE = f"static-kv-cache{{max={CONTEXT}}},swap-sdpa,capture,last-token-logits"
PROMPT = "a red circle"
MERGED = "merge-token-embedding"
CHANGES = {
    "merged": (MERGED, ["prefill", "decode"]),
    "split": ("split-prefill-first-chunk", ["token_embedding", "prefill", "decode", "prefill_first"]),
    "greedy": ("greedy-token", ["token_embedding", "prefill", "decode"]),
    "all": (f"{MERGED},split-prefill-first-chunk,greedy-token", ["prefill", "decode", "prefill_first"]),
}
TARGETS = ["eager", pytest.param("xnnpack", marks=pytest.mark.slow)]
Export = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("text") / "checkpoint")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Model:
    return load_checkpoint(checkpoint, max_context=CONTEXT)


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Return a function (target, passes after the usual ones) → the artifact's folder, each made once."""
    made: dict[tuple[str, str], Path] = {}

    def make(target: str, passes: str) -> Path:
        if (target, passes) not in made:
            out = tmp_path_factory.mktemp("artifact") / "artifact"
            pipeline = f"{BASE},{passes}" if passes else BASE
            triptych.export(checkpoint, out=out, target=target, pipeline=pipeline)
            made[target, passes] = out
        return made[target, passes]

    return make


def answers(folder: Path, chunk_size: int | None = None) -> list[tuple[int, ...]]:
    with Runner.from_pretrained(folder, threads=1, chunk_size=chunk_size) as runner:
        prompts = (PROMPT, "one", "the quick brown fox and a blue square")
        return [runner.generate(prompt, max_new_tokens=12).tokens for prompt in prompts]


def eager_answer(model: Model, ids: list[int], count: int) -> tuple[int, ...]:
    """Continue greedily with the model's own forward, nothing cached."""
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model.module(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(ids) :])


@pytest.mark.parametrize(
    ("target", "change"),
    [*(("eager", name) for name in CHANGES), pytest.param("xnnpack", "all", marks=pytest.mark.slow)],
)
def test_the_answers_are_the_models_own(
    export: Export, checkpoint: Path, model: Model, target: str, change: str
) -> None:
    passes, methods = CHANGES[change]
    folder = export(target, passes)
    assert sorted(triptych.load(folder).manifest.methods) == sorted(methods)
    got = answers(folder)
    assert got[0] == eager_answer(model, ids_of(checkpoint, PROMPT), 12)
    assert len(set(got)) == 3
    assert answers(folder, chunk_size=3) == got, "later chunks go on from the first"
    assert got == answers(export(target, ""))


@pytest.mark.parametrize("target", TARGETS)
def test_verify_holds_them_to_the_model(export: Export, model: Model, target: str) -> None:
    report = verify(export(target, CHANGES["all"][0]), model, tokens=4, prompt_lengths=(1, 9))
    assert report.passed, report.to_json()
    kinds = {difference.kl is None for one in report.traces for difference in one.comparison.outputs}
    assert kinds == {True, False}, "tokens of decode and logits of prefill"


def test_a_first_prefill_uses_the_method_for_it_and_later_ones_do_not(export: Export) -> None:
    with Runner.from_pretrained(export("eager", CHANGES["split"][0]), chunk_size=2) as runner:
        called: list[str] = []
        run = runner.methods.run

        def noted(method: str, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
            called.append(method)
            return run(method, **tensors)

        runner.methods.run = noted  # type: ignore[method-assign]
        runner.generate("the quick brown fox", max_new_tokens=2)
    prefills = [name for name in called if name.startswith("prefill")]
    assert prefills[0] == "prefill_first"
    assert len(prefills) > 1
    assert set(prefills[1:]) == {"prefill"}


@pytest.mark.slow
def test_a_second_prefill_method_stores_no_weight_again(export: Export) -> None:
    plain, split = (read_pte(export("xnnpack", passes) / "model.pte") for passes in ("", CHANGES["all"][0]))
    assert sum(split.weights.values()) == sum(plain.weights.values())
    assert split.methods["prefill_first"].weights == split.methods["prefill"].weights
    assert sum(split.constants.values()) <= sum(plain.constants.values()) * 1.01
    assert "aten::_local_scalar_dense" not in split.methods["prefill_first"].operators, "the position is a constant"
    assert split.methods["prefill_first"].operators["llama::custom_sdpa.out"] == 2
    assert split.methods["prefill_first"].state == split.methods["prefill"].state


def test_greedy_tokens_cannot_be_sampled(export: Export) -> None:
    with Runner.from_pretrained(export("eager", "greedy-token")) as runner:
        with pytest.raises(UsageError, match=r"temperature is 0\.8, and the method decode of this artifact chooses"):
            runner.generate(PROMPT, temperature=0.8)
        assert runner.session.position == 0, "refused before anything ran"
        assert runner.generate(PROMPT, max_new_tokens=2, top_k=5).tokens


@pytest.mark.parametrize("target", TARGETS)
def test_a_pruned_vocabulary_answers_with_kept_tokens_and_refuses_others(
    export: Export, checkpoint: Path, model: Model, tmp_path_factory: pytest.TempPathFactory, target: str
) -> None:
    ids = ids_of(checkpoint, PROMPT)
    kept = sorted({*ids, *range(5, 60)})
    path = tmp_path_factory.mktemp("kept") / "ids.txt"
    path.write_text("\n".join(map(str, kept)), encoding="utf-8")
    folder = export(target, f"prune-vocabulary{{keep={path}}},{MERGED}")
    report = verify(folder, model, tokens=4, prompt_lengths=(1, 9))
    assert report.passed, report.to_json()
    allowed = torch.tensor(sorted({*kept, 0, 1, 2}))
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(8):
            logits = model.module(torch.tensor([tokens])).logits[0, -1]
            tokens.append(int(allowed[logits[allowed].argmax()]))
    with Runner.from_pretrained(folder, threads=1) as runner:
        assert runner.generate(PROMPT, max_new_tokens=8).tokens == tuple(tokens[len(ids) :])
        with pytest.raises(RunError, match=r"the prompt has the token \d+ \('.+'\), which is not among the \d+ that"):
            runner.generate("lazy dog")
        assert runner.generate(PROMPT, max_new_tokens=8, temperature=5.0, seed=1).tokens, "others are never drawn"


@pytest.mark.slow
def test_pictures_go_through_a_first_prefill_and_a_greedy_decode(
    demo_checkpoint: Path, demo_eager: Path, tmp_path: Path
) -> None:
    pipeline = "static-kv-cache{max=256},swap-sdpa,capture,last-token-logits,split-prefill-first-chunk,greedy-token"
    triptych.export(demo_checkpoint, out=tmp_path / "artifact", target="eager", pipeline=pipeline)
    picture = Image.new("RGB", (64, 64), (200, 30, 30))
    texts = []
    for folder in (tmp_path / "artifact", demo_eager):
        with Runner.from_pretrained(folder) as runner:
            texts.append(runner.generate("What is there?", [picture], max_new_tokens=10).text)
    assert texts[0] == texts[1] != ""
