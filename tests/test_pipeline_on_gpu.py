"""The whole flow on a GPU, found by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fourfold import pipeline
from fourfold.config import load_config
from fourfold.models.loading import load_model
from fourfold.quantization.hf_quantizer import FourfoldConfig

pytestmark = pytest.mark.gpu


def _rows(path: Path, number: int) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {i % 5}"}, {"role": "assistant", "content": f"{i % 5}"}]}
        for i in range(number)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("packing", [False, True])
def test_a_model_is_trained_evaluated_merged_and_answers_on_the_gpu(
    packing: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    overrides = {
        "model_name_or_path": tiny_llama,
        "train_dataset": _rows(tmp_path / "train.jsonl", 64),
        "eval_dataset": _rows(tmp_path / "test.jsonl", 10),
        "output_dir": tmp_path / "run",
        "max_steps": 30,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "packing": packing,
        "max_length": 64,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_steps": 10,
        "save_steps": 10,
        "eval_generate_rows": 4,
        "eval_max_new_tokens": 8,
    }
    config = load_config(None, [f"--{key}={value}" for key, value in overrides.items()])
    run = pipeline.train(config, "plain")
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] / 2
    assert run.metrics["memory_peak_bytes"] <= torch.cuda.max_memory_allocated()
    evaluated = pipeline.evaluate(load_config(str(run.output_dir)))
    assert evaluated["eval_loss"] == pytest.approx(run.metrics["eval_loss"], rel=2e-2)
    report = pipeline.merge(str(run.output_dir), tmp_path / "merged", bound=0.05)
    assert report.dtype == "bfloat16"
    session = pipeline.chat(str(run.output_dir), max_new_tokens=4)
    assert session.model.device.type == "cuda"
    assert isinstance("".join(session.reply([{"role": "user", "content": "say 3"}])), str)


def test_loading_quantizes_on_the_gpu_without_ever_holding_the_16_bit_model(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, num_attention_heads=16
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    dense_bytes = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loaded = load_model(tmp_path, quantization=FourfoldConfig(), dtype=torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    held = torch.cuda.memory_allocated() - before
    assert next(loaded.parameters()).device.type == "cuda"
    assert held < 0.3 * dense_bytes
    # What is in flight: one tensor in 16 bits and its fp32 workings.
    assert peak < held + 10 * largest
    assert peak < 0.8 * dense_bytes
