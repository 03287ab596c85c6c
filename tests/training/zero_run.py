"""What each of several processes runs for test_zero.py: torchrun ... zero_run.py OUT CASE..., results as JSON.

A case is NAME=DISTRIBUTED[,offload=OFFLOAD][,key=value...]; all run one after the other, since importing takes longer.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import tiny
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftModel, get_peft_model

from fourfold.adapters.lora import register
from fourfold.models.block import fuse_blocks
from fourfold.quantization.linear import QuantizedLinear
from fourfold.training.processes import join

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Uneven, so that a partition has to be filled up.
RANK = 3


def model(fused: bool, dtype: torch.dtype = torch.float32) -> PeftModel:
    base = tiny.base_model(dtype)
    for name, module in list(base.named_modules()):
        if name.rpartition(".")[2] in TARGETS:
            parent, _, own = name.rpartition(".")
            setattr(base.get_submodule(parent), own, QuantizedLinear.from_linear(module, name=name))
    torch.manual_seed(1)
    config = register(LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    if fused:
        fuse_blocks(adapted, cuda_graphs=False)
    return adapted


def train(out: Path, name: str, distributed: str, resume: str | None = None, **keys: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "cosine",
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "distributed": distributed,
    }
    fused = keys.pop("fused", "yes") == "yes"
    options |= {key: int(value) if str(value).isdigit() else value for key, value in keys.items()}
    if "deepspeed" in options:
        options["deepspeed"] = Path(options["deepspeed"])
    adapted = model(fused)
    trainer = tiny.trainer(out / name, adapted, dataset=tiny.rows(40), eval_dataset=tiny.rows(6, seed=9), **options)
    trainer.train(resume_from_checkpoint=resume)
    log = trainer.state.log_history
    held = {path: _held(value) for path, value in adapted.named_parameters() if ".layers.0.self_attn.q_proj" in path}
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in log if "loss" in entry],
        "eval_losses": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "held": held,
    }


def _held(parameter: torch.Tensor) -> list[Any]:
    part = getattr(parameter, "ds_tensor", parameter)
    return [str(part.dtype), part.numel()]


def main() -> None:
    out = Path(sys.argv[1])
    own = join("cpu", timeout=120)
    results = {}
    for case in sys.argv[2:]:
        name, _, rest = case.partition("=")
        distributed, *pairs = rest.split(",")
        results[name] = train(out, name, distributed, **dict(pair.split("=", 1) for pair in pairs))
        gc.collect()
        # Each run is a process of its own elsewhere.
        AcceleratorState._reset_state(False)
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    (out / f"results-{own.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
