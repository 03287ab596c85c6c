"""A step of AdamW over the LoRA parameters of an 8B Llama (r=16, all linears): ours and its peers, interleaved.

    python benchmarks/kernels/adamw.py [--repeats 30] [--json FILE]

448 fp32 tensors of 41.9M elements with fp32 gradients. Every candidate clips to a norm of 1.0. The limit is what a
step must move (gradients read for the norm and again for the update, parameters and moments read and written) at the
bandwidth of a copy, measured in the same run; for paged state, what its moments take over the link to the host, both
ways at once, at the bandwidth of a copy from there. "wall" is the time of a step when one waits for each, "host" what
the CPU is busy for; "launches" counts kernels and copies.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fourfold.optimizers import AdamW

RANK, LAYERS = 16, 32
# (out, in) of q, k, v, o, gate, up and down.
LINEARS = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
SETTINGS = {"lr": 1e-4, "weight_decay": 0.01}
CLIP = 1.0


def parameters() -> list[nn.Parameter]:
    shapes = [shape for out, inner in LINEARS for shape in ((RANK, inner), (out, RANK))] * LAYERS
    params = [nn.Parameter(torch.randn(shape, device="cuda") * 0.01) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def candidates() -> dict[str, tuple[Callable[[], object], int]]:
    """Name -> (one step with clipping, bytes a parameter of which the moments take: read and written)."""

    def clipped(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> Callable[[], object]:
        def step() -> None:
            nn.utils.clip_grad_norm_(params, CLIP)
            optimizer.step()

        return step

    def ours(bits: int, placement: str = "resident") -> Callable[[], object]:
        return AdamW(parameters(), **SETTINGS, state_bits=bits, max_grad_norm=CLIP, placement=placement).step

    def theirs(make: Callable[..., torch.optim.Optimizer], **options: object) -> Callable[[], object]:
        params = parameters()
        return clipped(make(params, **SETTINGS, **options), params)

    return {
        "ours, 8-bit": (ours(8), 4),
        "ours, 32-bit": (ours(32), 16),
        "ours, 8-bit, paged": (ours(8, "paged"), 4),
        "ours, 32-bit, paged": (ours(32, "paged"), 16),
        "bitsandbytes AdamW8bit": (theirs(bitsandbytes.optim.AdamW8bit), 4),
        "bitsandbytes PagedAdamW8bit": (theirs(bitsandbytes.optim.PagedAdamW8bit), 4),
        "torch AdamW fused": (theirs(torch.optim.AdamW, fused=True), 16),
    }


def copy_bandwidth() -> float:
    """Bytes a second that a copy on the GPU reads and writes."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    return 2 * source.nbytes / copy_seconds(source)


def link_bandwidth() -> float:
    """Bytes a second that come from the host's pinned memory."""
    source = torch.empty(1 << 26, dtype=torch.float32, pin_memory=True)
    return source.nbytes / copy_seconds(source)


def copy_seconds(source: torch.Tensor) -> float:
    target = torch.empty_like(source, device="cuda")
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def launches(step: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in record.events())


def measure(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds, `repeats` rounds that run every candidate in turn."""
    times: dict[str, dict[str, list[float]]] = {name: {"wall": [], "host": [], "device": []} for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(repeats):
        for name, step in steps.items():
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began = time.perf_counter()
            start.record()
            step()
            end.record()
            busy = time.perf_counter()
            torch.cuda.synchronize()
            done = time.perf_counter()
            times[name]["host"].append((busy - began) * 1e3)
            times[name]["wall"].append((done - began) * 1e3)
            times[name]["device"].append(start.elapsed_time(end))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the figures go")
    arguments = parser.parse_args()

    numel = sum(param.numel() for param in parameters())
    made = candidates()
    bandwidth, link = copy_bandwidth(), link_bandwidth()
    times = measure({name: step for name, (step, _) in made.items()}, arguments.repeats)
    rows = []
    print(f"{numel / 1e6:.1f}M parameters; copy {bandwidth / 1e12:.2f} TB/s, from the host {link / 1e9:.1f} GB/s")
    print(f"{'':<28} {'wall ms':>8} {'host ms':>8} {'device ms':>9} {'launches':>8} {'limit ms':>8} {'of limit':>8}")
    for name, (step, moment_bytes) in made.items():
        # A parameter is read and written, a gradient read for the norm and for the update.
        limit = numel * (8 + 8 + moment_bytes) / bandwidth * 1e3
        if name.endswith("paged"):
            limit = max(limit, numel * moment_bytes / 2 / link * 1e3)
        median = {kind: statistics.median(values) for kind, values in times[name].items()}
        count = launches(step)
        print(
            f"{name:<28} {median['wall']:8.3f} {median['host']:8.3f} {median['device']:9.3f} {count:8d} {limit:8.3f} "
            f"{limit / median['device']:8.0%}"
        )
        rows.append({"name": name, **{f"{k}_ms": v for k, v in median.items()}, "launches": count, "limit_ms": limit})
    if arguments.json is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(),
            "parameters": numel,
            "copy_bytes_per_second": bandwidth,
            "link_bytes_per_second": link,
            "versions": {
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in ("torch", "triton", "bitsandbytes")},
            },
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
