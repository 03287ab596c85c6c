"""The fused block's elementwise kernels on a GPU, at Llama-3-8B's shapes, in bf16: ours and Liger's.

    python benchmarks/kernels/block.py [--tokens 8192 2048] [--json FILE]

Bytes are what a call must move once; their share of the bandwidth is that of a copy of 512 MiB in the same run. Liger's
calls do less where that is said: its gradient of SwiGLU leaves no y, its rotation passes v by.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import itertools
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from liger_kernel.ops import rms_norm as liger_norm
from liger_kernel.ops import rope as liger_rope
from liger_kernel.ops import swiglu as liger_swiglu
from torch import Tensor

from fourfold.kernels import grad_a, low_rank, low_rank_beside, low_rank_pair, norm, rotary, swiglu

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
WARM_UP, RUNS = 3, 30
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
Row = tuple[str, str, int, Callable[[], Any]]


def random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


@functools.cache
def _filler() -> Tensor:
    return torch.empty(1 << 31, dtype=torch.uint8, device="cuda")


def microseconds(function: Callable[[], Any]) -> float:
    """The median of the GPU's times, each call's data out of its cache."""
    for _ in range(WARM_UP):
        function()
    times = []
    for _ in range(RUNS):
        # While the GPU is at this, the host launches what is timed, which it may take longer for than the GPU.
        _filler().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 1e3 * float(statistics.median(start.elapsed_time(end) for start, end in times))


def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.zeros(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source)) * 1e6


def norms(tokens: int) -> Iterator[Row]:
    x, grad, residual, weight = random(tokens, HIDDEN), random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN)
    size = 2 * tokens * HIDDEN
    _, rstd = norm.rms_norm(x, weight, 1e-5)
    arguments = (grad, x, weight, rstd, residual)
    yield "rms_norm", "ours", 2 * size, lambda: norm.rms_norm(x, weight, 1e-5)
    yield "rms_norm", "Liger", 2 * size, lambda: liger_norm.rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)
    yield "rms_norm_backward", "ours", 4 * size, lambda: norm.rms_norm_backward(*arguments)
    _, _, _, block, warps, mode = liger_norm.rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)

    def liger_backward() -> None:
        # Its gradient is of the norm alone; the residual's is added behind.
        grad_x, _ = liger_norm.rms_norm_backward(grad, x, weight, rstd, 0.0, mode, block, warps, False, None, False)
        grad_x.add_(residual)

    yield "rms_norm_backward", "Liger + add", 4 * size, liger_backward


def activations(tokens: int) -> Iterator[Row]:
    size = 2 * tokens * INTERMEDIATE
    gate_up = random(tokens, 2 * INTERMEDIATE)
    gate, up, grad = (random(tokens, INTERMEDIATE) for _ in range(3))
    yield "swiglu", "ours", 3 * size, lambda: swiglu.swiglu(gate_up)
    yield "swiglu", "Liger", 3 * size, lambda: liger_swiglu.swiglu_forward(gate, up)
    # Run over and over in place, values shrink or grow, which does not change the time.
    yield "swiglu_backward_", "ours", 6 * size, lambda: swiglu.swiglu_backward_(gate_up, grad)
    yield "swiglu_backward_", "Liger (no y)", 5 * size, lambda: liger_swiglu.swiglu_backward(gate, up, grad)


def activations_with_adapters(tokens: int) -> Iterator[Row]:
    """With the products that adapters on gate, up and down want, of rank 16: ours in one pass, and one by one."""
    size, rank = 2 * tokens * INTERMEDIATE, 16
    gate_up, grad = random(tokens, 2 * INTERMEDIATE), random(tokens, INTERMEDIATE)
    low, grad_low, projection = random(tokens, 2 * rank), random(tokens, rank), random(rank, INTERMEDIATE)
    arguments = (gate_up, grad, low, rank, grad_low)
    sums = swiglu.swiglu_backward_sums_(*arguments)

    def sums_apart() -> None:
        swiglu.swiglu_backward_(gate_up, grad)
        low_rank.low_rank_grad(low, gate_up)
        low_rank.low_rank_grad(grad_low, grad)

    yield "swiglu, A", "ours", 3 * size, lambda: swiglu.swiglu(gate_up, projection)
    yield "swiglu, A", "apart", 3 * size, lambda: swiglu.swiglu(gate_up) @ projection.T
    yield "swiglu_backward_sums_", "ours", 5 * size, lambda: swiglu.swiglu_backward_sums_(*arguments)
    yield "swiglu_backward_sums_", "ours, added", 5 * size, lambda: swiglu.swiglu_backward_sums_(*arguments, out=sums)
    yield "swiglu_backward_sums_", "apart", 5 * size, sums_apart


def low_rank_pairs(tokens: int) -> Iterator[Row]:
    """Both low-rank products of the gradient of o or down, of rank 16, and of q, k and v, 16 each: at once, and apart.

    Fewer than 4,096 tokens have them apart either way.
    """
    for width, begins in ((HIDDEN, ()), (QKV, (HEADS * HEAD_DIM, (HEADS + KV_HEADS) * HEAD_DIM))):
        rank = 16 * (len(begins) + 1)
        extended = low_rank.new_extended(random(1), tokens, width, rank).normal_()
        up, low = random(width, rank).T, random(tokens, rank)
        arguments = (extended, width, up, low, begins, [0.5] * (len(begins) + 1))
        for whose, function in (
            ("ours", low_rank_pair.low_rank_pair_),
            ("cuBLAS", low_rank_pair.low_rank_pair_reference_),
        ):
            yield f"low_rank_pair_ {width}", whose, 2 * tokens * width, functools.partial(function, *arguments)


def gradients_of_a(tokens: int) -> Iterator[Row]:
    """Of o, whose input is as it is, and of gate and up, and q, k and v, whose input is a norm's output."""
    x, weight = random(tokens, HIDDEN), random(HIDDEN)
    rstd = torch.rand(tokens, device="cuda") + 0.5
    for rank in (16, 32, 48):
        grad_low = low_rank.new_extended(random(1), tokens, HIDDEN, rank).normal_()[:, HIDDEN:]
        arguments = (grad_low, x) if rank == 16 else (grad_low, x, rstd, weight)
        for whose, function in (("ours", grad_a.grad_a), ("cuBLAS", grad_a.grad_a_reference)):
            yield f"grad_a {rank}", whose, 2 * tokens * HIDDEN, functools.partial(function, *arguments)


def attention_beside(tokens: int) -> Iterator[Row]:
    """The attention's output beside its product with o's A, of rank 16."""
    x, projection = random(tokens, HIDDEN), random(16, HIDDEN)
    for whose, function in (
        ("ours", low_rank_beside.low_rank_beside),
        ("PyTorch", low_rank_beside.low_rank_beside_reference),
    ):
        yield "low_rank_beside", whose, 2 * 2 * tokens * HIDDEN, functools.partial(function, x, projection)
    for rank in (32, 48):
        extended = low_rank.new_extended(random(1), tokens, HIDDEN, rank).normal_()
        arguments = (extended, HIDDEN, random(rank, HIDDEN))
        for whose, fill in (
            ("ours", low_rank_beside.fill_low_rank_),
            ("cuBLAS", low_rank_beside.fill_low_rank_reference_),
        ):
            yield f"fill_low_rank_ {rank}", whose, 2 * tokens * HIDDEN, functools.partial(fill, *arguments)


def rotations(tokens: int) -> Iterator[Row]:
    size = 2 * tokens * QKV
    qkv = random(tokens, QKV)
    cos, sin = random(2048, HEAD_DIM), random(2048, HEAD_DIM)
    q_size, k_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    parts = [part.contiguous() for part in qkv.split([q_size, k_size, k_size], dim=1)]
    batch = tokens // 2048
    q = random(batch, 2048, HEADS, HEAD_DIM).transpose(1, 2)
    k = random(batch, 2048, KV_HEADS, HEAD_DIM).transpose(1, 2)
    q_norm, k_norm = random(HEAD_DIM), random(HEAD_DIM)
    heads = (HEADS, KV_HEADS)
    rotated = 2 * 2 * tokens * (q_size + k_size)
    yield "rotary", "ours", 2 * size, lambda: rotary.rotary(qkv, cos, sin, *heads)
    yield (
        "rotary",
        "ours, head norms",
        2 * size,
        lambda: rotary.rotary(qkv, cos, sin, *heads, None, q_norm, k_norm, 1e-6),
    )
    yield "rotary_", "ours", rotated, lambda: rotary.rotary_(qkv, cos, sin, *heads)
    yield "rotary_", "Liger", rotated, lambda: liger_rope.rope_forward(q, k, cos[None], sin[None])
    yield "rotary_backward", "ours", 2 * size, lambda: rotary.rotary_backward(*parts, None, cos, sin, *heads)
    yield "rotary_backward", "Liger (q, k)", rotated, lambda: liger_rope.rope_backward(q, k, cos[None], sin[None])


FAMILIES = (norms, activations, activations_with_adapters, low_rank_pairs, gradients_of_a, attention_beside, rotations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 2048], help="multiples of 2048")
    parser.add_argument("--json", type=Path, help="where the rows go")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'tokens':>6}  {'kernel':<21} {'whose':<18} {'MiB':>8} {'us':>9} {'% of copy':>10}")
    rows = []
    for tokens in arguments.tokens:
        for name, whose, num_bytes, function in itertools.chain(*(family(tokens) for family in FAMILIES)):
            time = microseconds(function)
            share = num_bytes / time * 1e6 / bandwidth
            print(f"{tokens:>6}  {name:<21} {whose:<18} {num_bytes / 2**20:8.1f} {time:9.1f} {share:10.1%}")
            row = {"tokens": tokens, "kernel": name, "whose": whose, "bytes": num_bytes, "us": time, "share": share}
            rows.append(row)
    if arguments.json is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "gpu": torch.cuda.get_device_name(),
            "copy_bytes_per_s": bandwidth,
            "versions": {
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in ("torch", "triton", "liger-kernel")},
            },
            "rows": rows,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
