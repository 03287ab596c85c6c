"""Several GPUs: throughput, memory and loss of QLoRA by DDP and FSDP2 beside one GPU, and 70B on two small ones.

    python benchmarks/distributed.py [--settings 8b-one-gpu 8b-ddp 8b-fsdp2 70b-fsdp2-24GB] [--json FILE]
    python benchmarks/distributed.py --tiny        the same on a CPU by gloo, where nothing is measured

Models have random NF4 weights, made on the spot, adapters of rank 16 on all linear layers, and rows of 2,048 random
tokens, all of them labelled. Each setting runs by a torchrun of its own. What is measured:

- seconds of a step at the same batch on each GPU, without and with recomputation, and the ratio of tokens a second to
  one GPU's;
- the base's bytes on each GPU, all that torch has allocated once the model stands, and the peak;
- the loss over 50 steps on data that is the same: one GPU with twice the rows, two with a half each.

70b: each process may take 24 GiB of its GPU. Its layers are made one at a time and sharded as they come.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, distributed, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fourfold
from fourfold.data import supervised_positions
from fourfold.models.block import set_recomputation
from fourfold.models.sharding import gathered_head, held_bytes, shard_model
from fourfold.optimizers import AdamW
from fourfold.quantization.formats import get_format
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.swapping import dense_linears
from fourfold.quantization.tensor import QuantizedTensor
from fourfold.training.hidden_states import last_hidden_states
from fourfold.training.loss import supervised_cross_entropy
from memory import LINEARS, about
from memory import SHAPES as LARGE

# With layers and a vocabulary that two processes cannot divide evenly.
ODD = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
SHAPES: dict[str, dict[str, Any]] = LARGE | {"tiny": ODD | {"num_key_value_heads": 2, "vocab_size": 250}}
CAP_BYTES = 24 * 2**30
# Of code points drawn evenly, times this, the values have the spread of trained weights, 0.02.
ABSMAX = 0.033


@dataclass(frozen=True)
class Setting:
    """What runs, and how.

    Args:
        strategy: "one", "ddp" or "fsdp2".
        policies: Of recomputation, whose speed is measured.
        batch, seq: Rows on each GPU, and their tokens.
        steps: Measured ones of each policy.
        loss_steps: Those of the comparison, of two rows in all; 0: there is none.
        cap: Bytes that a process may take of its GPU.
    """

    shape: str
    strategy: str
    policies: tuple[str, ...] = ("none", "selective")
    batch: int = 4
    seq: int = 2048
    steps: int = 6
    loss_steps: int = 50
    cap: int | None = None

    @property
    def num_processes(self) -> int:
        return 1 if self.strategy == "one" else 2


SETTINGS: dict[str, Setting] = {
    "8b-one-gpu": Setting("8b", "one"),
    "8b-ddp": Setting("8b", "ddp"),
    "8b-fsdp2": Setting("8b", "fsdp2"),
    "70b-fsdp2-24GB": Setting("70b", "fsdp2", ("full_offload",), batch=1, steps=3, loss_steps=0, cap=CAP_BYTES),
}
TINY: dict[str, Setting] = {
    "tiny-one-gpu": Setting("tiny", "one", batch=2, seq=32, steps=2, loss_steps=3),
    "tiny-ddp": Setting("tiny", "ddp", batch=2, seq=32, steps=2, loss_steps=3),
    "tiny-fsdp2": Setting("tiny", "fsdp2", batch=2, seq=32, steps=2, loss_steps=3),
    "tiny-capped": Setting("tiny", "fsdp2", ("full_offload",), batch=1, seq=32, steps=1, loss_steps=0, cap=CAP_BYTES),
}


class Drawn:
    """Random weights for a model that has none, the same in every process: see `fill`."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def quantized(self, rows: int, columns: int) -> QuantizedTensor:
        """NF4 with double quantization: codes are drawn, which takes a tenth of the time of quantizing."""
        nf4, count = get_format("nf4"), rows * columns
        drawn: Any = {"device": self.device, "generator": self.generator}
        codes = torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, **drawn)
        absmax = ABSMAX * (0.8 + 0.4 * torch.rand(count // 64, **drawn))
        shape = torch.Size((rows, columns))
        return QuantizedTensor(
            codes, NestedScales.quantize(absmax), nf4.codebook(self.device), nf4, 64, shape, torch.bfloat16
        )

    def fill(self, part: nn.Module) -> None:
        """Give what of `part` is on no device its weights."""
        for module in part.modules():
            if isinstance(module, QuantizedLinear) and module.weight.is_meta:
                module.quantized = self.quantized(module.out_features, module.in_features)
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.is_meta:
                    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
                    nn.init.ones_(values) if values.dim() == 1 else values.normal_(0, 0.02, generator=self.generator)
                    setattr(module, name, nn.Parameter(values, requires_grad=parameter.requires_grad))


def empty_model(shape: str, dtype: torch.dtype, fused: bool, device: torch.device) -> PeftModel:
    """A model on no device, its linear layers quantized and with adapters; angles alone are there."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device("meta"):
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=dtype)
        head = model.get_output_embeddings()
        for name, linear in list(dense_linears(model)):
            if linear is not head:
                sizes = linear.in_features, linear.out_features
                model.set_submodule(name, QuantizedLinear(*sizes, bias=False, device="meta", dtype=dtype))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    with torch.device("meta"):
        return fourfold.prepare(model, lora, fused=fused, recompute="none" if fused else None)


def train_step(
    model: nn.Module, adapted: PeftModel, optimizer: AdamW, ids: Tensor, num_processes: int
) -> Callable[[], Tensor]:
    base = adapted.get_base_model()
    positions = supervised_positions(torch.zeros(ids.shape, dtype=torch.int64)).to(ids.device)
    # As the trainer has it: the sum over the labels of all GPUs, by their number; gradients are averaged.
    scale = num_processes / (len(positions) * num_processes)

    def step(now: Tensor = ids) -> Tensor:
        batch = {"input_ids": now, "supervised_positions": positions}
        hidden, _ = last_hidden_states(model, base, batch)
        with gathered_head(base):
            loss = supervised_cross_entropy(hidden, now, base.get_output_embeddings(), positions).loss_sum * scale
        del hidden
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def timed(step: Callable[[], Tensor], steps: int, device: torch.device) -> float:
    """Median seconds of a step, after three that compile and capture."""
    seconds = []
    for number in range(3 + steps):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if number >= 3:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def start_anew(adapted: PeftModel) -> None:
    """The adapters as they were: A drawn in the same way in all settings, B zero."""
    for name, parameter in adapted.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = torch.zeros(parameter.shape)
        if "lora_A" in name:
            seed = sum(name.encode()) + 7919 * len(name)
            whole.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
        local: Any = parameter.data
        if hasattr(local, "to_local"):
            local = local.to_local()
            whole = whole.chunk(distributed.get_world_size())[distributed.get_rank()]
        local.copy_(whole)


def compare_loss(
    model: nn.Module, adapted: PeftModel, setting: Setting, vocab: int, rank: int, device: torch.device
) -> list[float]:
    """Losses of steps over two rows in all, drawn anew in each, the same in every setting."""
    start_anew(adapted)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    # With 2e-4 random weights of this size leave their way now and then, and what rounds otherwise does not follow.
    optimizer = AdamW(trained, lr=5e-5, max_grad_norm=1.0)
    generator, world = torch.Generator().manual_seed(1), setting.num_processes
    losses = []
    step: Any = None
    for _ in range(setting.loss_steps):
        # Few different tokens, so that there is something to learn.
        ids = torch.randint(10, min(vocab, 500), (2, setting.seq), generator=generator)
        own = ids[rank * 2 // world : (rank + 1) * 2 // world].to(device)
        step = step or train_step(model, adapted, optimizer, own, world)
        losses.append(step(own))
    means = torch.stack(losses).float()
    if world > 1:
        distributed.all_reduce(means)
    return (means / world).tolist()


def run(name: str, setting: Setting) -> dict[str, Any] | None:
    """One setting, in this process of it; what the main process found."""
    began = time.perf_counter()
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.is_available() and setting.shape != "tiny"
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        if setting.cap is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(setting.cap / total, device)
    distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    adapted = empty_model(setting.shape, dtype, True, device)
    drawn = Drawn(device, dtype)
    if setting.strategy == "fsdp2":
        shard_model(adapted, device, drawn.fill)
    else:
        drawn.fill(adapted)
    adapted.train()
    start_anew(adapted)
    model: nn.Module = adapted
    if setting.strategy == "ddp":
        ids = [local] if on_gpu else None
        options: dict[str, Any] = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
        model = nn.parallel.DistributedDataParallel(adapted, device_ids=ids, **options)
    result: dict[str, Any] = {"name": name, "gpus": setting.num_processes, "built_seconds": time.perf_counter() - began}
    result["weights_bytes"] = held_bytes(adapted)
    if on_gpu:
        gc.collect()
        # Parameters and scales, and whatever else was left behind.
        result["standing_bytes"] = torch.cuda.memory_allocated()
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=1e-5, state_bits=8, max_grad_norm=1.0)
    vocab = SHAPES[setting.shape]["vocab_size"]
    rows = torch.Generator().manual_seed(rank)
    ids = torch.randint(10, vocab, (setting.batch, setting.seq), generator=rows).to(device)
    for policy in setting.policies:
        set_recomputation(adapted, policy)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        step = train_step(model, adapted, optimizer, ids, setting.num_processes)
        seconds = timed(step, setting.steps, device)
        tokens = setting.num_processes * setting.batch * setting.seq
        found = {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
        if on_gpu:
            free, total = torch.cuda.mem_get_info()
            # What is beside torch's own: the context and NCCL's buffers, where no one else uses the GPU.
            beside, reserved = total - free - torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
            found |= {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved": reserved}
            found |= {"process_bytes": reserved + beside}
        result[policy] = found
    del optimizer
    if setting.loss_steps:
        set_recomputation(adapted, "none")
        result["losses"] = compare_loss(model, adapted, setting, vocab, rank, device)
    distributed.barrier()
    distributed.destroy_process_group()
    return result if rank == 0 else None


def run_apart(name: str, setting: Setting) -> dict[str, Any]:
    """One setting by a torchrun of its own."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", str(setting.num_processes), __file__, "--only", name]
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"name"')]
    if done.returncode or not lines:
        return {"name": name, "error": (done.stderr or done.stdout)[-3000:]}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def beside_one(row: dict[str, Any], one: dict[str, Any] | None) -> dict[str, Any]:
    """The row with what it comes to beside one GPU's."""
    if one is None or row is one or "error" in row or "error" in one:
        return row
    shared = [policy for policy in ("none", "selective") if policy in row and policy in one]
    for policy in shared:
        row[policy]["times_one_gpu"] = row[policy]["tokens_per_second"] / one[policy]["tokens_per_second"]
    for part in ("weights", "standing"):
        if f"{part}_bytes" in row and f"{part}_bytes" in one:
            row[f"{part}_of_one_gpu"] = row[f"{part}_bytes"] / one[f"{part}_bytes"]
    if "losses" in row:
        off = [abs(a - b) / b for a, b in zip(row["losses"], one["losses"], strict=True)]
        row["loss_off_by"] = {"mean": statistics.mean(off), "largest": max(off)}
    return row


def shown(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    lines = [f"{row['name']}: built in {row['built_seconds']:.1f} s"]
    for part in ("weights", "standing"):
        if f"{part}_bytes" in row:
            lines[0] += f", {part} {row[f'{part}_bytes'] / 2**30:.2f} GiB a GPU"
        if f"{part}_of_one_gpu" in row:
            lines[0] += f" ({row[f'{part}_of_one_gpu']:.3f} of one GPU's)"
    for policy, found in row.items():
        if isinstance(found, dict) and "step_seconds" in found:
            line = f"  {policy:<14} {found['step_seconds']:.3f} s/step  {found['tokens_per_second']:>9,.0f} tokens/s"
            if "times_one_gpu" in found:
                line += f"  {found['times_one_gpu']:.2f} x one GPU"
            if "peak_bytes" in found:
                line += (
                    f"  peak {found['peak_bytes'] / 2**30:.2f} GiB, process {found['process_bytes'] / 2**30:.2f} GiB"
                )
            lines.append(line)
    if "losses" in row:
        lines.append(f"  loss {row['losses'][0]:.5f} -> {row['losses'][-1]:.5f} in {len(row['losses'])} steps")
    if "loss_off_by" in row:
        off = row["loss_off_by"]
        lines[-1] += f"; off one GPU's by {off['mean']:.2e} in the mean, {off['largest']:.2e} at most"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = SETTINGS | TINY
    parser.add_argument("--settings", nargs="+", choices=known, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, by gloo")
    parser.add_argument("--only", choices=known, metavar="SETTING", help="within torchrun: this, printed as JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.only is not None:
        result = run(args.only, known[args.only])
        if result is not None:
            print(json.dumps(result), flush=True)
        return
    record = about(shlex.join(["python", "benchmarks/distributed.py", *sys.argv[1:]])) | {
        "gpus": torch.cuda.device_count()
    }
    rows: list[dict[str, Any]] = []
    one: dict[str, Any] | None = None
    for name in list(TINY) if args.tiny else args.settings:
        row = run_apart(name, known[name])
        one = row if name.endswith("one-gpu") else one
        rows.append(beside_one(row, one))
        print(shown(row), flush=True)
        if args.json is not None:
            args.json.write_text(json.dumps({**record, "rows": rows}, indent=2) + "\n")
    sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
    main()
