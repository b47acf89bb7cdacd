"""Fixtures that every test may ask for, and the conditions that every test runs under."""

import logging
import os
import random
from collections.abc import Callable, Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from filelock import FileLock

# Before anything imports a Hugging Face library: no test may reach for a hub, and no tokenizer forks threads.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from tests import assets

if TYPE_CHECKING:
    from triptych.compiler.model import Model

# Workers that run side by side keep the cores busy by themselves; more threads only wait for one another.
THREADS: Final = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
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


# ---------------------------------------------------------------------------------------------------- golden texts


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` rewrites the files under tests/golden instead of comparing with them."""
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the tests see now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Return a function (file name, text) that holds `text` to tests/golden/<file name>."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"{path} is missing; make it with pytest --update-golden and read what it says"
        assert text == path.read_text(encoding="utf-8"), f"{name} differs; if it should, run pytest --update-golden"

    return check


# ---------------------------------------------------------------------------------------------------- exported models

DEMO_CONTEXT: Final = 256
SMOLLM2_CONTEXT: Final = 512


@pytest.fixture(scope="session")
def demo_model(demo_checkpoint: Path) -> "Model":
    """The embedded model, described; the reference of every artifact made from it."""
    from triptych.compiler.adapters.hugging_face import load

    return load(demo_checkpoint, max_context=DEMO_CONTEXT)


@pytest.fixture(scope="session")
def smollm2_cut_model(smollm2_cut: Path) -> "Model":
    """Four layers of SmolLM2, described."""
    from triptych.compiler.adapters.hugging_face import load

    return load(smollm2_cut, max_context=SMOLLM2_CONTEXT)


@pytest.fixture(scope="session")
def export_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that exports a checkpoint, once for all workers of a run, and returns the artifact's folder."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def export(checkpoint: Path, target: str, recipe: str, max_context: int) -> Path:
        import triptych

        out = shared / f"{checkpoint.name}-{target}-{recipe}-{max_context}"
        with FileLock(f"{out}.lock"):
            if not out.exists():
                triptych.export(checkpoint, out=out, target=target, recipe=recipe, max_context=max_context)
        return out

    return export


@pytest.fixture(scope="session")
def demo_eager(demo_checkpoint: Path, export_once: Callable[..., Path]) -> Path:
    """The embedded model for the eager target, fp32."""
    return export_once(demo_checkpoint, "eager", "fp32", DEMO_CONTEXT)


@pytest.fixture(scope="session")
def demo_quantized_eager(demo_checkpoint: Path, export_once: Callable[..., Path]) -> Path:
    """The embedded model for the eager target, 8da4w."""
    return export_once(demo_checkpoint, "eager", "8da4w", DEMO_CONTEXT)


@pytest.fixture(scope="session")
def demo_xnnpack(demo_checkpoint: Path, export_once: Callable[..., Path]) -> Path:
    """The embedded model for XNNPACK, fp32; half a minute."""
    return export_once(demo_checkpoint, "xnnpack", "fp32", DEMO_CONTEXT)


@pytest.fixture(scope="session")
def demo_quantized_xnnpack(demo_checkpoint: Path, export_once: Callable[..., Path]) -> Path:
    """The embedded model for XNNPACK, 8da4w; three quarters of a minute."""
    return export_once(demo_checkpoint, "xnnpack", "8da4w", DEMO_CONTEXT)


@pytest.fixture(scope="session")
def demo_portable(demo_checkpoint: Path, export_once: Callable[..., Path]) -> Path:
    """The embedded model for ExecuTorch's portable kernels; half a minute."""
    return export_once(demo_checkpoint, "portable", "fp32", DEMO_CONTEXT)


@pytest.fixture(scope="session")
def smollm2_cut_xnnpack(smollm2_cut: Path, export_once: Callable[..., Path]) -> Path:
    """Four layers of SmolLM2 for XNNPACK, fp32; room for a prompt of 300 tokens."""
    return export_once(smollm2_cut, "xnnpack", "fp32", SMOLLM2_CONTEXT)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before the fixtures of a test run."""
    _no_torch_trace()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Before the test runs."""
    _no_torch_trace()


def _no_torch_trace() -> None:
    """Keep torch from writing a structured trace of every capture, which makes captures ten times as slow.

    It writes one where its trace logger has a handler, and pytest hands its own to loggers that do not propagate.
    Torch sets that logger up anew now and then, so once is not enough.
    """
    trace = logging.getLogger("torch.__trace")
    trace.handlers.clear()
    trace.propagate = True
