"""Whole training steps as they are planned for cards smaller than this GPU, under a hard cap on the process's memory.

    python benchmarks/cards.py [--settings 8b-in-8GB ...] [--json FILE]

A card stands for itself by `torch.cuda.set_per_process_memory_fraction`: the process gets what the card would leave it
after the context, from before the model is built. Models have random weights and are built under the cap as well. The
plan decides how the step is run; where a setting names no length, also how long the row is: the longest that it says
fits. "process" is the most that torch reserved, and what the process took beside it at the end. Each setting is a
process of its own.

Unsloth, in settings of its name, takes rows longer and longer until memory runs out, under the same cap.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig

import fourfold
from fourfold.kernels.host_memory import HostBuffer, spare_bytes
from fourfold.memory.gpus import CONTEXT_BYTES, Gpu, gpu_by_name, gpu_present
from fourfold.memory.planner import OptimizerBytes, Plan, make_plan
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.optimizers import AdamW
from fourfold.optimizers.footprint import state_bytes
from memory import LINEARS, SHAPES, about, make_step, random_model

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """One step of QLoRA, one row.

    Args:
        gib: Memory of the card.
        seq: Tokens of the row; None: as many as fit.
        streams: Where the base streams from.
        steps: How many are run.
        lengths: Of Unsloth's rows; none: fourfold trains.
    """

    shape: str
    gib: float
    seq: int | None = 2048
    rank: int = 16
    streams: str | None = None
    steps: int = 4
    lengths: tuple[int, ...] = ()


SETTINGS = {
    "8b-in-8GB": Setting("8b", 8),
    "33b-in-24GB": Setting("33b", 24, rank=64),
    "65b-in-48GB": Setting("65b", 48, rank=64),
    "70b-in-24GB-streamed": Setting("70b", 24, streams="host"),
    "8b-longest-in-24GB": Setting("8b", 24, seq=None, rank=32, steps=1),
    "8b-98304-in-24GB": Setting("8b", 24, seq=98304, rank=32, steps=1),
    "8b-401408-in-80GB": Setting("8b", 80, seq=401408, rank=32, steps=1),
    "unsloth-in-24GB": Setting("8b", 24, rank=32, lengths=(16384, 32768, 49152, 65536, 78848, 90112)),
}
# For a look at the command on a CPU, where nothing is capped.
TINY = {"tiny": Setting("tiny", 1, seq=64), "tiny-longest": Setting("tiny", 0.9, seq=None)}
LONGER_BY = 2048


def planned(shape: ModelShape, gpu: Gpu, seq: int, streams: str | None) -> Plan:
    optimizer = OptimizerBytes("adamw_8bit", state_bytes("adamw", 8, shape.adapter_shapes))
    options: dict[str, Any] = {"optimizers": [optimizer], "host_bytes": spare_bytes(), "streams": streams}
    return make_plan(shape, gpu, rows=1, seq=seq, **options)


def longest(shape: ModelShape, gpu: Gpu, streams: str | None) -> int:
    """Tokens of the longest row that is planned to fit, by bisection."""
    few, many = 1, 2
    while planned(shape, gpu, many * LONGER_BY, streams).chosen is not None:
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        fits = planned(shape, gpu, middle * LONGER_BY, streams).chosen is not None
        few, many = (middle, many) if fits else (few, middle)
    return few * LONGER_BY


def cap(gib: float) -> None:
    """What the card has, less what a plan takes a context for, is all that torch may have."""
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction((gib * GIB - CONTEXT_BYTES) / total)


def beside_torch() -> int:
    """Bytes of the GPU that torch's allocator does not hold: the context, where no one else uses it."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def train(setting: Setting, device: torch.device) -> dict[str, Any]:
    config = LlamaConfig(**SHAPES[setting.shape], max_position_embeddings=2**20)
    shape = model_shape(config, fourfold.FourfoldConfig(), setting.rank)
    gpu = replace(gpu_present() or gpu_by_name("H200"), memory_bytes=int(setting.gib * GIB))
    seq = setting.seq or longest(shape, gpu, setting.streams)
    plan = planned(shape, gpu, seq, setting.streams)
    chosen = plan.chosen
    if chosen is None:
        return {"seq": seq, "error": plan.lines()[-1]}
    result: dict[str, Any] = {
        "seq": seq,
        "recompute": chosen.recompute_text,
        "planned_bytes": chosen.footprint.peak_bytes,
        "planned_seconds": chosen.seconds,
        "host_bytes": chosen.footprint.host_bytes,
        "parts": chosen.footprint.parts,
    }
    if device.type == "cuda":
        cap(setting.gib)
    torch.manual_seed(0)
    model = random_model(config, True, device, layers_on="cpu" if setting.streams else None)
    adapter = LoraConfig(r=setting.rank, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    options: dict[str, Any] = {"recompute": chosen.recompute, "stream_base": setting.streams}
    prepared = fourfold.prepare(model, adapter, fused=True, **options)
    prepared.train()
    trained = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
    optimizer = AdamW(trained, lr=1e-5, state_bits=8, max_grad_norm=1.0)
    step = make_step(prepared, optimizer, 1, seq, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(setting.steps):
        start = time.perf_counter()
        losses.append(float(step()))
        seconds.append(time.perf_counter() - start)
    result |= {"loss": losses, "seconds": min(seconds)}
    if device.type == "cuda":
        result |= held()
    if setting.streams:
        result["link_seconds"] = 2 * sum(shape.layer_bytes) / link_rate(max(shape.layer_bytes), device)
    return result


def held() -> dict[str, int]:
    beside, reserved = beside_torch(), torch.cuda.max_memory_reserved()
    peak = torch.cuda.max_memory_allocated()
    return {"measured_bytes": peak, "context_bytes": beside, "process_bytes": reserved + beside}


def link_rate(num_bytes: int, device: torch.device) -> float:
    """Bytes a second of copies from locked host memory, with nothing beside them."""
    buffer = HostBuffer(num_bytes, pinned=device.type == "cuda", purpose="a measurement")
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target.copy_(buffer.data)
    start, count = time.perf_counter(), 16
    for _ in range(count):
        target.copy_(buffer.data, non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return count * num_bytes / (time.perf_counter() - start)


def train_unsloth(setting: Setting, models: Path) -> dict[str, Any]:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from systems import SYSTEMS, Job

    cap(setting.gib)
    settings = {"recompute": True, "policy": None, "device": "cuda", "rank": setting.rank}
    job = Job("unsloth", str(models / setting.shape), 1, max(setting.lengths), **settings)
    training = SYSTEMS["unsloth"](job)()
    rows: list[dict[str, Any]] = []
    for length in (512, *setting.lengths):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(10, 32000, (1, length), device="cuda")
        start = time.perf_counter()
        try:
            training.loss(ids).backward()
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            rows.append({"seq": length, "error": "out of memory"})
            break
        rows.append({"seq": length, "seconds": time.perf_counter() - start, **held()})
    return {"rows": rows}


def shown(name: str, row: dict[str, Any]) -> list[str]:
    if "rows" in row:
        return [line for one in row["rows"] for line in shown(f"{name} {one['seq']:,}", one)]
    if "error" in row:
        return [f"{name}: {row['error']}"]
    line = f"{name}: {row['seq']:,} tokens, {row['seconds']:.2f} s, {row['seq'] / row['seconds']:,.0f} tokens/s"
    if "planned_seconds" in row:
        line += f" (planned {row['planned_seconds']:.2f} s, {row['planned_bytes'] / GIB:.2f} GiB; {row['recompute']})"
        line += f", host {row['host_bytes'] / GIB:.1f} GiB, loss {row['loss'][0]:.2f}"
    if "measured_bytes" in row:
        line += f", peak {row['measured_bytes'] / GIB:.2f} GiB, process {row['process_bytes'] / GIB:.2f}"
        line += f" of which context {row['context_bytes'] / GIB:.2f}"
    if "link_seconds" in row:
        line += f", {row['link_seconds'] / row['seconds']:.0%} of the link's speed"
    return [line]


def run_apart(name: str, models: Path | None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, *(["--models", str(models)] if models else [])]
    # As the `fourfold` command has it; Unsloth sets it itself.
    grows = {} if (SETTINGS | TINY)[name].lengths else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **grows})
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": f"failed: {done.stderr[-3000:]}"}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = SETTINGS | TINY
    parser.add_argument("--settings", nargs="+", choices=every, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--models", type=Path, help="folder of the checkpoint that Unsloth loads, as of shapes.py")
    parser.add_argument("--only", choices=every, metavar="SETTING", help="run one here, and print it as JSON")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.only is not None:
        setting = every[args.only]
        result = train_unsloth(setting, args.models) if setting.lengths else train(setting, device)
        print(json.dumps({"name": args.only, "setting": asdict(setting), **result}))
        return
    results = []
    record = about(f"python benchmarks/cards.py --settings {' '.join(args.settings)}")
    for name in args.settings:
        results.append(run_apart(name, args.models))
        print("\n".join(shown(name, results[-1])), flush=True)
        if args.json is not None:
            # After each: what was measured is not lost with what was not.
            args.json.write_text(json.dumps({**record, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
