"""What it costs that an optimizer's state lives in host memory: whole LoRA steps with each, in turn, on one model.

    python benchmarks/paging.py [--shape 8b] [--rows 4] [--seq 2048] [--json FILE]

The model has random weights in NF4; the adapters' rank is 16 on all linear layers. The median of all turns counts; the
last column compares paged with resident state of the same bits.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig

import fourfold
from fourfold.training.options import OPTIMIZERS
from memory import LINEARS, SHAPES, about, make_step, random_model

NAMES = ("adamw", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")
# Paged -> with the same state on the GPU.
RESIDENT = {"paged_adamw_32bit": "adamw", "paged_adamw_8bit": "adamw_8bit"}
WARM_UP, STEPS, TURNS = 4, 5, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--recompute", default="selective")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[args.shape], max_position_embeddings=131072)
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
    options: dict[str, Any] = {"fused": True, "recompute": args.recompute}
    model = fourfold.prepare(random_model(config, True, device), adapter, **options)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    record = about(f"python benchmarks/paging.py --shape {args.shape} --rows {args.rows} --seq {args.seq}") | {
        "recompute": args.recompute
    }
    seconds: dict[str, list[float]] = {}
    peaks: dict[str, int] = {}
    for turn in range(TURNS):
        for name in NAMES:
            row = OPTIMIZERS[name]
            assert row is not None
            gc.collect()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            optimizer = row.optimizer(trained, lr=1e-5, max_grad_norm=1.0, **row.arguments())
            step = make_step(model, optimizer, args.rows, args.seq, device)
            warm_up = WARM_UP if turn == 0 and name == NAMES[0] else 1
            for number in range(warm_up + STEPS):
                start = time.perf_counter()
                float(step())
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number >= warm_up:
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
            peaks[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            del optimizer, step
        rows = table(seconds, peaks)
        if args.json is not None:
            # After each turn: what was measured is not lost with what was not.
            args.json.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")


def table(seconds: dict[str, list[float]], peaks: dict[str, int]) -> list[dict[str, Any]]:
    """Prints and gives the medians so far."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    print(f"{'':<20} {'s':>8} {'peak GiB':>9} {'paged':>8}")
    for name, median in medians.items():
        slower = median / medians[RESIDENT[name]] - 1 if name in RESIDENT else None
        rows.append({"optim": name, "seconds": median, "peak_bytes": peaks[name], "slower_by": slower})
        told = "" if slower is None else f"{slower:+.1%}"
        print(f"{name:<20} {median:8.4f} {peaks[name] / 2**30:9.3f} {told:>8}", flush=True)
    return rows


if __name__ == "__main__":
    main()
