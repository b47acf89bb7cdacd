"""Fixtures that every test may ask for, and the conditions that every test runs under."""

import os
import random
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

import pytest

# Before anything imports a Hugging Face library: no test may reach for a hub, and no tokenizer forks threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from tests import assets

THREADS: Final = 2
SEED: Final = 20_240


@pytest.fixture(scope="session", autouse=True)
def _torch_threads() -> None:
    """The same number of threads everywhere: sums differ in their last bits with it."""
    import torch

    torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Random tensors and samples are the same in every run and in every order of the tests."""
    import torch

    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def demo_checkpoint() -> Iterator[Path]:
    """The embedded default: a small vision-language model in plain Hugging Face form."""
    with as_file(files("triptych.demo").joinpath("model")) as folder:
        assert (folder / "config.json").is_file(), f"the embedded checkpoint is missing: {folder}"
        yield folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, whole; tests that ask for it are marked `real`."""
    return assets.smollm2_checkpoint()


@pytest.fixture(scope="session")
def smollm2_cut() -> Path:
    """The first four layers of SmolLM2-135M-Instruct."""
    return assets.smollm2_cut(layers=4)
