"""Attention on one GPU: every kernel of the table that takes the case, and PyTorch's own choice, interleaved.

    python benchmarks/kernels/attention.py [--rounds 10] [--json FILE]

q, k and v are parts of one buffer, as a layer of a model has them; bf16, 32 heads over 8. Rates count the scores that
causality and the documents' bounds leave: 2 * head_dim * (sum of length ** 2) * heads FLOP forward, 2.5 times as many
backward. "padded" runs packed documents as a padded batch through the kernel for whole rows, the padding not counted.
"host_us" is what a call takes on the CPU, which bounds short steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fourfold.models.attention import Documents, attention_backward, attention_forward

HEADS, KV_HEADS = 32, 8
MIXED = [2048, 1536, 1024, 900, 700, 612, 512, 400, 300, 160]  # 8,192 tokens


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    length: int
    head_dim: int
    lengths: tuple[int, ...] = ()

    def flop(self) -> float:
        squares = sum(n * n for n in self.lengths) if self.lengths else self.batch * self.length**2
        return 2.0 * self.head_dim * squares * HEADS

    def documents(self) -> Documents | None:
        if not self.lengths:
            return None
        bounds = torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device="cuda")
        return Documents(bounds, max(self.lengths))


CASES = [
    Case("4 x 2048, head_dim 128", 4, 2048, 128),
    Case("4 x 2048, head_dim 64", 4, 2048, 64),
    Case("1 x 2048, head_dim 128", 1, 2048, 128),
    Case("1 x 32768, head_dim 128", 1, 32768, 128),
    Case("1 x 32768, head_dim 64", 1, 32768, 64),
    Case("8192 packed, head_dim 128", 1, 8192, 128, tuple(MIXED)),
    Case("8192 packed, head_dim 64", 1, 8192, 64, tuple(MIXED)),
]

Pair = tuple[Callable[[], Any], Callable[[], Any]]


def make_qkv(batch: int, length: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    buffer = torch.randn(batch, length, (HEADS + 2 * KV_HEADS) * head_dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = buffer.unflatten(-1, (-1, head_dim)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    return q, k, v


def by_row(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None, backend: str) -> Pair:
    """Forward and backward of one row of the table."""
    scale = q.shape[-1] ** -0.5
    out, state = attention_forward(q, k, v, scale=scale, documents=documents, backend=backend)
    grad = torch.randn_like(out)
    return (
        lambda: attention_forward(q, k, v, scale=scale, documents=documents, backend=backend),
        lambda: attention_backward(grad, q, k, v, out, state, scale=scale, documents=documents),
    )


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """PyTorch's scaled_dot_product_attention and its autograd, with the kernel that it chooses."""
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]

    def forward() -> Tensor:
        return functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)

    out = forward()
    grad = torch.randn_like(out)
    return forward, lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def candidates(case: Case) -> dict[str, Pair]:
    documents = case.documents()
    q, k, v = make_qkv(case.batch, case.length, case.head_dim)
    if documents is None:
        rows = {name: by_row(q, k, v, None, name) for name in ("cudnn", "flash", "efficient")}
        return rows | {"sdpa": by_sdpa(q, k, v)}
    padded = make_qkv(len(case.lengths), max(case.lengths), case.head_dim)
    return {
        "flash": by_row(q, k, v, documents, "flash"),
        "efficient": by_row(q, k, v, documents, "efficient"),
        "padded cudnn": by_row(*padded, None, "cudnn"),
        "padded flash": by_row(*padded, None, "flash"),
    }


def measure(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds on the GPU and microseconds on the host of a call, medians over rounds that run each in turn."""
    gpu: dict[str, list[float]] = {name: [] for name in functions}
    host: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    calls = 5
    for _ in range(rounds):
        for name, function in functions.items():
            torch.cuda.synchronize()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            host[name].append((time.perf_counter() - start) / calls * 1e6)
            end.record()
            torch.cuda.synchronize()
            gpu[name].append(begin.elapsed_time(end) / calls)
    return {name: {"ms": statistics.median(gpu[name]), "host_us": statistics.median(host[name])} for name in functions}


def run(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        pairs = candidates(case)
        for index, (way, factor) in enumerate((("forward", 1.0), ("backward", 2.5))):
            times = measure({name: pair[index] for name, pair in pairs.items()}, rounds)
            fastest = min(t["ms"] for t in times.values())
            for name, t in times.items():
                rate = case.flop() * factor / t["ms"] / 1e9
                row = {"case": case.name, "way": way, "kernel": name, **t, "tflops": rate, "slower": t["ms"] / fastest}
                rows.append(row)
                print(
                    f"{case.name:28}{way:10}{name:14}{t['ms']:9.3f} ms{t['host_us']:8.0f} us on the host"
                    f"{rate:8.0f} TFLOP/s{row['slower']:7.2f} x the fastest",
                    flush=True,
                )
        del pairs
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = run(options.rounds)
    if options.json is not None:
        versions = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        result = {"command": shlex.join(["python", *sys.argv]), "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
