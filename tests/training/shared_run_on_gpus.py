"""A run on GPUs, by torchrun: shared_run_on_gpus.py FOLDER one|ddp|fsdp2|one-from-fsdp2. It leaves FOLDER/NAME.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import fourfold
from fourfold.data import Collator
from fourfold.models.block import FusedDecoderLayer
from fourfold.models.sharding import held_bytes
from fourfold.training.building import build_trainer
from fourfold.training.distributed import processes
from fourfold.training.options import TrainingOptions
from fourfold.training.processes import join

STEPS, SEQ, VOCAB = 10, 256, 4096


def write_base(folder: Path) -> None:
    """A Llama of 100 million weights, so that what is not sharded is small beside it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")


def rows() -> Dataset:
    """Each row counts up from somewhere: there is something to learn."""
    starts = torch.randint(2, 200, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    made = [[2 + (start + step) % 200 for step in range(SEQ)] for start in starts]
    return Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in made])


def main(folder: Path, name: str) -> None:
    own = join("auto", 120)
    device = torch.device("cuda", own.local_rank)
    torch.cuda.set_device(device)
    way = name if name in ("ddp", "fsdp2") else "auto"
    base = fourfold.load_model(
        folder / "base", quantization=fourfold.FourfoldConfig(), device="cpu" if way == "fsdp2" else device
    )
    torch.manual_seed(1)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = fourfold.prepare(base, lora, recompute="none", cuda_graphs=True, device=device)
    options: dict[str, Any] = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1}
    options |= {"max_steps": STEPS, "save_steps": 5, "save_total_limit": None, "optim": "adamw"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2 // own.count}
    trainer = build_trainer(
        model,
        tiny.tokenizer(),
        rows(),
        None,
        Collator(0),
        TrainingOptions(output_dir=folder / name, compute_dtype="float32", distributed=way, **options),
    )
    weights = held_bytes(model)
    trainer.train(resume_from_checkpoint=folder / "fsdp2" / "checkpoint-5" if name == "one-from-fsdp2" else None)
    layers = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    graphs = {id(layer._graphs): layer._graphs for layer in layers if layer._graphs is not None}
    torch.cuda.empty_cache()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    record = {key: [entry[key] for entry in history] for key in ("loss", "grad_norm")}
    record |= {"weights_bytes": weights, "standing_bytes": torch.cuda.memory_allocated()}
    record |= {"graphs": sum(len(each._graphs) for each in graphs.values())}
    record |= {"reasons": sorted({reason for layer in layers for reason in layer._told})}
    record |= {"weighed": tiny.weighed_factors(trainer)}
    if processes().is_main:
        (folder / f"{name}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
