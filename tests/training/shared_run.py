"""Runs that several processes share, and the same in one: `torchrun shared_run.py FOLDER` makes them all.

What each came to stands in FOLDER/NAME.json and, of weights, FOLDER/NAME.safetensors.
"""

from __future__ import annotations

import gc
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import fourfold
from fourfold.errors import FourfoldError
from fourfold.kernels.shards import local_part
from fourfold.models.sharding import gathered_head, held_bytes, shard_model
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.swapping import dense_linears
from fourfold.training.distributed import processes
from fourfold.training.hidden_states import last_hidden_states
from fourfold.training.loss import supervised_cross_entropy
from fourfold.training.trainer import FourfoldTrainer

STEPS = 6
WEIGHT = 0.3
# Rows of a step: of 2 processes 2 in each of 2 passes, of one in 4 passes.
SHARED: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 3, "save_total_limit": None}


def model(fused: bool = True, **lora: Any) -> Any:
    """A quantized base with adapters; the same in each process."""
    base = tiny.base_model()
    head = base.get_output_embeddings()
    for name, linear in list(dense_linears(base)):
        if linear is not head:
            base.set_submodule(name, QuantizedLinear.from_linear(linear))
    torch.manual_seed(1)
    adapted = fourfold.prepare(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **lora), fused=fused)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted


def trainer(folder: Path, made: Any = None, **options: Any) -> FourfoldTrainer:
    passes = 4 // processes().count
    given = {"gradient_accumulation_steps": passes, "max_grad_norm": 0.5} | SHARED | options
    return tiny.trainer(folder, model() if made is None else made, dataset=tiny.rows(64), **given)


def write(folder: Path, name: str, ran: FourfoldTrainer) -> None:
    """Its losses, norms and evaluations by step, and what it trained."""
    history = [entry for entry in ran.state.log_history if "loss" in entry]
    weights = ran.whole_weights()
    if not processes().is_main:
        return
    own = {name: value.detach() for name, value in ran.model.named_parameters() if value.requires_grad}
    save_file({key: value.contiguous() for key, value in (weights or own).items()}, folder / f"{name}.safetensors")
    record = {key: [entry[key] for entry in history] for key in ("loss", "grad_norm")}
    record["eval_loss"] = [entry["eval_loss"] for entry in ran.state.log_history if "eval_loss" in entry]
    (folder / f"{name}.json").write_text(json.dumps(record))


def plain(folder: Path, name: str, **options: Any) -> None:
    ran = trainer(folder / name, **options)
    ran.train()
    write(folder, name, ran)
    ran.weigh_adapter(WEIGHT)
    write(folder, f"{name}-weighed", ran)


def full(folder: Path, name: str, **options: Any) -> None:
    """All weights are trained: embedding, head and norms too."""
    ran = trainer(folder / name, tiny.base_model(), max_steps=2, save_steps=1, learning_rate=1e-3, **options)
    ran.train()
    write(folder, name, ran)


def gone_on(folder: Path, name: str, checkpoint: Path, **options: Any) -> None:
    """From another run's checkpoint to the end."""
    ran = trainer(folder / name, **options)
    ran.train(resume_from_checkpoint=checkpoint)
    write(folder, name, ran)


class Spoil(TrainerCallback):
    """Makes the loss of one process, or what it takes of a signal, another."""

    def __init__(self, rank: int, kind: str) -> None:
        self.is_here, self.kind = processes().rank == rank, kind

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if not self.is_here or state.global_step != 1:
            return
        if self.kind == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            layer = model.get_base_model().model.layers[0]
            layer.input_layernorm.weight.data.fill_(math.nan)


def ended(folder: Path, name: str, kind: str, **options: Any) -> None:
    """A run that one process ends for all: what each raised."""
    ran = trainer(folder / name, callbacks=(Spoil(1, kind),), **options)
    try:
        ran.train()
    except FourfoldError as error:
        record = {"type": type(error).__name__, "text": str(error), "step": ran.state.global_step}
        (folder / f"{name}-{processes().rank}.json").write_text(json.dumps(record))


def storages() -> dict[int, torch.UntypedStorage]:
    """Those of all tensors of this process, by address, which nothing else has while they are held here."""
    gc.collect()
    found = [local_part(each) for each in gc.get_objects() if issubclass(type(each), Tensor) and not each.is_meta]
    held = [each.untyped_storage() for each in found]
    return {each.data_ptr(): each for each in held}


def filled(folder: Path) -> None:
    """A base that gets its weights layer by layer while it is sharded: what it says that it holds, and what is held."""
    before = storages()
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=tiny.VOCAB))
    head = base.get_output_embeddings()
    for name, linear in list(dense_linears(base)):
        if linear is not head:
            empty = QuantizedLinear(linear.in_features, linear.out_features, bias=False, device="meta")
            base.set_submodule(name, empty)

    def fill(part: nn.Module) -> None:
        for module in part.modules():
            if isinstance(module, QuantizedLinear) and module.weight.is_meta:
                module.quantized = fourfold.quantize(torch.randn(module.out_features, module.in_features))

    shard_model(base, torch.device("cpu"), fill)
    alive = sum(each.nbytes() for address, each in storages().items() if address not in before)
    record = {"held": held_bytes(base), "alive": alive}
    (folder / f"filled-{processes().rank}.json").write_text(json.dumps(record))


def gathered(folder: Path) -> None:
    """What FSDP2 gathers and reduces in a step, in order."""
    adapted = model()
    base = adapted.get_base_model()
    shard_model(adapted, torch.device("cpu"))
    ids = tiny.collate(list(tiny.rows(2)))["input_ids"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        hidden, _ = last_hidden_states(adapted, base, {"input_ids": ids})
        with gathered_head(base):
            loss = supervised_cross_entropy(hidden, ids, base.get_output_embeddings()).loss_sum
        loss.backward()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    found = [re.fullmatch(r"FSDP::(all_gather|post_backward_reduce) \((.*)\)", event.name) for event in events]
    order = [(match[1], match[2].split(".")[-1]) for match in found if match is not None]
    (folder / f"gathered-{processes().rank}.json").write_text(json.dumps(order))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    held_out = {"eval_dataset": tiny.rows(7, seed=5), "eval_strategy": "steps", "eval_steps": 3}
    for way in ("ddp", "fsdp2"):
        plain(folder, way, distributed=way, **held_out)
        full(folder, f"full-{way}", distributed=way)
        ended(folder, f"spoiled-{way}", "loss", distributed=way)
        ended(folder, f"signal-{way}", "signal", distributed=way)
        gone_on(folder, f"one-to-{way}", folder / "one" / "checkpoint-3", distributed=way)
    plain(folder, "fsdp2-generic", made=model(fused=False), distributed="fsdp2", gradient_checkpointing=True)
    plain(folder, "fsdp2-8bit", distributed="fsdp2", optim="paged_adamw_8bit")
    gone_on(folder, "ddp-to-fsdp2", folder / "ddp" / "checkpoint-3", distributed="fsdp2")
    gone_on(folder, "one-8bit-to-fsdp2", folder / "one-8bit" / "checkpoint-3", distributed="fsdp2", optim="adamw_8bit")
    filled(folder)
    gathered(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
