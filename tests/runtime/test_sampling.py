import math

import pytest
import torch

from triptych.errors import RunError, UsageError
from triptych.runtime.sampling import Sampler, keep_top_k, keep_top_p

INF = math.inf


def test_greedy_takes_the_highest_and_the_first_of_equals() -> None:
    sampler = Sampler(seed=0)
    assert sampler.sample(torch.tensor([[0.0, 3.0, 3.0, -INF]])) == 1
    assert sampler.sample(torch.tensor([1.0, 0.5], dtype=torch.float16)) == 0


@pytest.mark.parametrize("value", [1, 3, 40, 500])
def test_top_k_equals_transformers(value: int) -> None:
    from transformers.generation.logits_process import TopKLogitsWarper

    for _ in range(20):
        logits = torch.randn(100)
        expected = TopKLogitsWarper(value)(torch.empty(1, 0, dtype=torch.long), logits[None])[0]
        assert torch.equal(keep_top_k(logits, value), expected)


@pytest.mark.parametrize("value", [0.01, 0.5, 0.9, 1.0])
def test_top_p_equals_transformers(value: float) -> None:
    from transformers.generation.logits_process import TopPLogitsWarper

    for _ in range(20):
        logits = torch.randn(100) * 3
        expected = TopPLogitsWarper(value)(torch.empty(1, 0, dtype=torch.long), logits[None])[0]
        kept, wanted = keep_top_p(logits, value).isfinite(), expected.isfinite()
        # At 1.0 transformers drops tokens whose cumulative probability rounds to 0; we keep all.
        assert torch.equal(kept, wanted) or (value == 1.0 and kept.all())


def test_draws_follow_the_distribution() -> None:
    """Chi-square of 20,000 draws over four tokens; the bound is the 99.9 % quantile at 3 degrees of freedom."""
    logits, temperature, draws = torch.tensor([1.0, 0.0, -1.0, 2.0]), 0.7, 20_000
    sampler = Sampler(seed=5)
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[sampler.sample(logits, temperature=temperature)] += 1
    expected = (logits / temperature).softmax(0) * draws
    assert ((counts - expected) ** 2 / expected).sum() < 16.27


def test_filters_bound_what_is_drawn() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])
    sampler = Sampler(seed=1)
    assert {sampler.sample(logits, temperature=5.0, top_k=2) for _ in range(200)} == {2, 3}
    assert {sampler.sample(logits, temperature=0.5, top_p=0.5) for _ in range(50)} == {3}


def test_a_seed_repeats_the_draws() -> None:
    logits = torch.zeros(1, 50)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(seed)
        return [sampler.sample(logits, temperature=1.0) for _ in range(20)]

    torch.manual_seed(0)
    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0},
        {"temperature": INF},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_impossible_settings(settings: dict[str, float]) -> None:
    name = next(iter(settings))
    with pytest.raises(UsageError, match=f"{name} is"):
        Sampler().sample(torch.zeros(4), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.tensor([0.0, math.nan]), "highest logit is nan"),
        (torch.tensor([0.0, INF]), "highest logit is inf"),
        (torch.tensor([-INF, -INF]), "all logits are -inf"),
        (torch.zeros(2, 3), r"shape \[V\]"),
        (torch.zeros(0), "expected floats"),
        (torch.zeros(3, dtype=torch.int64), "expected floats"),
    ],
)
def test_broken_logits(logits: torch.Tensor, message: str) -> None:
    with pytest.raises(RunError, match=message):
        Sampler().sample(logits, temperature=1.0)
    with pytest.raises(RunError, match=message):
        Sampler().sample(logits)
