"""A run on a GPU plans by default, and takes what was planned."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fourfold.config import RunConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_takes_what_was_planned(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], tiny_tokenizer: PreTrainedTokenizerBase, packing: bool
) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=len(tiny_tokenizer))
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    del model
    torch.cuda.empty_cache()
    keys = {"bnb_4bit_compute_dtype": "bfloat16", "device": "auto", "optim": "adamw_8bit", "logging_steps": 1}
    rows = {"max_length": 512, "packing": packing, "per_device_train_batch_size": 4, "eval_dataset": None}
    run = tiny_run(tmp_path, model_name_or_path=str(tmp_path / "model"), **keys, **rows)
    # Enough of them that packed rows are full.
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() * 20)
    (tmp_path / "run.yaml").write_text(run.to_yaml())
    # A process of its own: what others hold in this one would be measured, too.
    code = "from fourfold.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(tmp_path / "run.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    events = {event["event"]: event for event in map(json.loads, done.stdout.splitlines())}
    measured = events["result"]["metrics"]["memory_peak_bytes"]
    planned = events["plan"]["chosen"]["peak_bytes"]
    # Rows that are shorter than planned take less.
    assert planned > 0.97 * measured - 32 * 2**20, (planned, measured)
    if packing:
        assert planned < 1.03 * measured + 32 * 2**20, (planned, measured)
