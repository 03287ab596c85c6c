"""What each of several processes runs for the tests of ZeRO: torchrun ... zero_run.py OUT CASE..., results as JSON.

A case is NAME=DISTRIBUTED[,key=value...]; all run one after the other, since importing takes longer than they do. Keys
are options of the trainer, and: dtype; fused=no; resume=CHECKPOINT; wide=yes, on a CPU the model for GPUs; nudge=SEED,
which moves each trained weight by one unit in its last place, up or down, after each step.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from fourfold.adapters.lora import register
from fourfold.errors import FourfoldError
from fourfold.models.block import fuse_blocks
from fourfold.quantization.linear import QuantizedLinear
from fourfold.training.out_of_memory import standing_parts
from fourfold.training.processes import join

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Odd, so that the last partition of a matrix has to be filled up.
RANK = 3
# Wide enough for the kernels of a GPU.
ON_GPU = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 2}


def launch(out: Path, *cases: str, processes: int = 2, device: str = "cpu") -> dict[str, Any]:
    """Run the cases in processes of their own, and give what the main one found."""
    out.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ZERO_RUN_DEVICE": device}
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, __file__, str(out), *cases], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    found: dict[str, Any] = json.loads((out / "results-0.json").read_text())
    return found


class Nudge(TrainerCallback):
    """Moves trained weights by as little as rounding otherwise would."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for weight in (each.data for each in model.parameters() if each.requires_grad):
            is_up = torch.randint(0, 2, weight.shape, generator=self.generator).bool().to(weight.device)
            weight.copy_(weight.nextafter(torch.where(is_up, math.inf, -math.inf).to(weight.dtype)))


def model(fused: bool, dtype: torch.dtype, device: str, wide: bool = False) -> PeftModel:
    if device == "cpu" and not wide:
        base = tiny.base_model(dtype)
    else:
        torch.manual_seed(0)
        shape = {"num_hidden_layers": 4, "vocab_size": tiny.VOCAB, "pad_token_id": 0, "eos_token_id": 1} | ON_GPU
        base = LlamaForCausalLM(LlamaConfig(**shape)).to(dtype).to("cpu" if device == "cpu" else "cuda")
    for path, module in list(base.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in TARGETS:
            setattr(base.get_submodule(parent), name, QuantizedLinear.from_linear(module, name=path))
    torch.manual_seed(1)
    config = register(LoraConfig(r=RANK, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    adapted = get_peft_model(base, config)
    for path, parameter in adapted.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(parameter, std=0.05)
    if fused:
        fuse_blocks(adapted, cuda_graphs=False)
    return adapted


def train(out: Path, name: str, distributed: str, device: str = "cpu", **keys: str) -> dict[str, Any]:
    """One run of four steps with a checkpoint after the second; what it came to."""
    options: dict[str, Any] = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": None,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "distributed": distributed,
        "use_cpu": device == "cpu",
    }
    fused, resume = keys.pop("fused", "yes") == "yes", keys.pop("resume", None)
    dtype = getattr(torch, keys.pop("dtype", "float32"))
    wide, nudge = keys.pop("wide", "no") == "yes", keys.pop("nudge", None)
    options |= {key: yaml.safe_load(value) for key, value in keys.items()}
    if "deepspeed" in options:
        options["deepspeed"] = Path(options["deepspeed"])
    adapted = model(fused, dtype, device, wide)
    data = {"dataset": tiny.rows(40), "eval_dataset": tiny.rows(6, seed=9)}
    callbacks = () if nudge is None else (Nudge(int(nudge)),)
    trainer = tiny.trainer(out / name, adapted, callbacks=callbacks, **data, **options)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except FourfoldError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    log = trainer.state.log_history
    first = {path: value for path, value in adapted.named_parameters() if ".layers.0.self_attn.q_proj." in path}
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "norms": [float(entry["grad_norm"]) for entry in log if "loss" in entry],
        "eval_losses": [entry["eval_loss"] for entry in log if "eval_loss" in entry],
        "allocated": torch.cuda.memory_allocated() if device != "cpu" else 0,
        "weights_bytes": standing_parts(adapted, None)["weights"],
        "weighed": tiny.weighed_factors(trainer),
        "held": {path.partition("q_proj.")[2]: _held(value) for path, value in first.items()},
    }


def _held(parameter: Any) -> int:
    """Elements of a parameter that this process keeps between steps."""
    numel: int = getattr(parameter, "ds_tensor", parameter).numel()
    return numel


def main() -> None:
    out, device = Path(sys.argv[1]), os.environ["ZERO_RUN_DEVICE"]
    own = join("cpu" if device == "cpu" else "auto", timeout=120)
    results: dict[str, Any] = {"imported": "deepspeed" in sys.modules}
    for case in sys.argv[2:]:
        name, _, rest = case.partition("=")
        distributed, *pairs = rest.split(",")
        if distributed.startswith("zero") and device == "cpu":
            import deepspeed.ops

            # gloo serves as well, and need not be compiled first.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        results[name] = train(out, name, distributed, device, **dict(pair.split("=", 1) for pair in pairs))
        gc.collect()
        # Each run has processes of its own elsewhere.
        AcceleratorState._reset_state(False)
        GradientState._reset_state()
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    (out / f"results-{own.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
