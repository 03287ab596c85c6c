"""The fused block's elementwise and low-rank kernels on a GPU, at Llama-3-8B's shapes, in bf16.

    python benchmarks/kernels/block.py [--tokens 8192 2048] [--sweep] [--json FILE]

Each row is one call: "fused" lets the low-rank product ride along, "separate" runs the kernel without it and then
torch.mm, "Liger" is its kernel, which has no such product. Bytes are what must be moved once; their share of the
bandwidth is that of a copy of 1 GiB in the same run. --sweep times other tiles too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton.testing
from liger_kernel.ops import rms_norm as liger_norm
from liger_kernel.ops import rope as liger_rope
from liger_kernel.ops import swiglu as liger_swiglu
from torch import Tensor

from fourfold.kernels import low_rank, norm, norm_triton, rotary, swiglu, swiglu_triton
from fourfold.kernels.norm_triton import Tile

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
Row = tuple[str, str, int, Callable[[], Any]]


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=scale)


def microseconds(function: Callable[[], Any]) -> float:
    return 1e3 * float(triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median"))


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
    yield "rms_norm", "without", 2 * size, lambda: norm.rms_norm(x, weight, 1e-5)
    yield "rms_norm", "Liger", 2 * size, lambda: liger_norm.rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)
    yield "rms_norm_backward", "without", 4 * size, lambda: norm.rms_norm_backward(*arguments)
    _, _, _, block, warps, mode = liger_norm.rms_norm_forward(x, weight, 1e-5, 0.0, "llama", None)

    def liger_backward() -> None:
        # Its gradient is of the norm alone; the residual's is added behind.
        grad_x, _ = liger_norm.rms_norm_backward(grad, x, weight, rstd, 0.0, mode, block, warps, False, None, False)
        grad_x.add_(residual)

    yield "rms_norm_backward", "Liger + add", 4 * size, liger_backward
    for rank in (16, 32, 48):
        p = random(rank, HIDDEN, scale=0.02)
        columns = 2 * tokens * rank
        name = f"rms_norm r={rank}"
        yield name, "fused", 2 * size + columns, lambda p=p: norm.rms_norm(x, weight, 1e-5, p)
        yield name, "separate", 2 * size + columns, lambda p=p: torch.mm(norm.rms_norm(x, weight, 1e-5)[0], p.t())
        name = f"rms_norm_backward r={rank}"
        yield name, "fused", 4 * size + columns, lambda p=p: norm.rms_norm_backward(*arguments, p)
        yield name, "separate", 4 * size + columns, lambda p=p: torch.mm(norm.rms_norm_backward(*arguments), p.t())


def activations(tokens: int) -> Iterator[Row]:
    size = 2 * tokens * INTERMEDIATE
    gate_up = random(tokens, 2 * INTERMEDIATE)
    gate, up = random(tokens, INTERMEDIATE), random(tokens, INTERMEDIATE)
    p = random(16, INTERMEDIATE, scale=0.02)
    yield "swiglu", "without", 3 * size, lambda: swiglu.swiglu(gate_up)
    yield "swiglu", "Liger", 3 * size, lambda: liger_swiglu.swiglu_forward(gate, up)
    yield "swiglu r=16", "fused", 3 * size, lambda: swiglu.swiglu(gate_up, p)
    yield "swiglu r=16", "separate", 3 * size, lambda: torch.mm(swiglu.swiglu(gate_up), p.t())
    # Run over and over in place, values shrink or grow, which does not change the time.
    extended, grad, low = random(tokens, 2 * INTERMEDIATE + 32), random(tokens, INTERMEDIATE), random(tokens, 16)
    wide = random(32, 2 * INTERMEDIATE, scale=0.02)

    def separate() -> None:
        grad.addmm_(low, p)
        swiglu.swiglu_backward_(extended, grad)
        torch.mm(extended[:, : 2 * INTERMEDIATE], wide.t(), out=extended[:, 2 * INTERMEDIATE :])

    yield "swiglu_backward_", "without", 6 * size, lambda: swiglu.swiglu_backward_(extended, grad)
    yield "swiglu_backward_", "Liger (no y)", 5 * size, lambda: liger_swiglu.swiglu_backward(gate, up, grad)
    name = "swiglu_backward_ r=16+32"
    yield name, "fused", 6 * size, lambda: swiglu.swiglu_backward_(extended, grad, low, p, wide)
    yield name, "separate", 6 * size, separate


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
    yield "rotary", "without", 2 * size, lambda: rotary.rotary(qkv, cos, sin, *heads)
    yield "rotary", "head norms", 2 * size, lambda: rotary.rotary(qkv, cos, sin, *heads, None, q_norm, k_norm, 1e-6)
    yield "rotary_", "in place", rotated, lambda: rotary.rotary_(qkv, cos, sin, *heads)
    yield "rotary_", "Liger", rotated, lambda: liger_rope.rope_forward(q, k, cos[None], sin[None])
    yield "rotary_backward", "without", 2 * size, lambda: rotary.rotary_backward(*parts, None, cos, sin, *heads)
    yield "rotary_backward", "Liger (q, k)", rotated, lambda: liger_rope.rope_backward(q, k, cos[None], sin[None])
    p = random(48, QKV, scale=0.02)
    arguments = (*parts, None, cos, sin, *heads, None, None, None, 0.0)
    yield "rotary_backward r=48", "fused", 2 * size, lambda: rotary.rotary_backward(*arguments, p)
    yield "rotary_backward r=48", "separate", 2 * size, lambda: torch.mm(rotary.rotary_backward(*arguments), p.t())


def products(tokens: int) -> Iterator[Row]:
    for width, rank in itertools.product((HIDDEN, INTERMEDIATE, 2 * INTERMEDIATE), (16, 48)):
        x, a, low = random(tokens, width), random(rank, width), random(tokens, rank)
        size = 2 * tokens * width
        yield f"project {width} r={rank}", "kernel", size, lambda x=x, a=a: low_rank.project(x, a)
        yield f"project {width} r={rank}", "torch.mm", size, lambda x=x, a=a: torch.mm(x, a.t())
        name = f"low_rank_grad {width} r={rank}"
        yield name, "kernel", size, lambda x=x, low=low: low_rank.low_rank_grad(low, x)
        yield name, "torch.mm", size, lambda x=x, low=low: torch.mm(low.t(), x, out_dtype=torch.float32)


def other_tiles(tokens: int) -> Iterator[Row]:
    """The kernels with a product riding along, at tiles that are not the chosen ones."""
    x, grad, weight, rstd = random(tokens, HIDDEN), random(tokens, HIDDEN), random(HIDDEN), random(tokens).float()
    gate_up, p_down = random(tokens, 2 * INTERMEDIATE), random(16, INTERMEDIATE)
    extended, y, low = random(tokens, 2 * INTERMEDIATE + 32), random(tokens, INTERMEDIATE), random(tokens, 16)
    wide = random(32, 2 * INTERMEDIATE)
    size, large = 2 * tokens * HIDDEN, 2 * tokens * INTERMEDIATE
    for tile in itertools.starmap(Tile, itertools.product((16, 32, 64), (64, 128, 256), (4, 8), (2, 3))):
        text = "m={} k={} w={} s={}".format(*tile)
        for rank in (16, 48):
            p = random(rank, HIDDEN)
            name = f"rms_norm r={rank}"
            yield name, text, 2 * size, lambda p=p, t=tile: norm_triton.rms_norm(x, weight, 1e-5, p, t)
            arguments = (grad, x, weight, rstd, grad, p, tile)
            yield f"rms_norm_backward r={rank}", text, 4 * size, lambda a=arguments: norm_triton.rms_norm_backward(*a)
        yield "swiglu r=16", text, 3 * large, lambda t=tile: swiglu_triton.swiglu(gate_up, p_down, "silu", t)
        backward = (extended, y, low, p_down, wide, "silu", tile)
        yield "swiglu_backward_ r=16+32", text, 6 * large, lambda b=backward: swiglu_triton.swiglu_backward_(*b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 2048], help="multiples of 2048")
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
    parser.add_argument("--json", type=Path, help="where the rows go")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")

    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e12:.2f} TB/s")
    print(f"{'tokens':>6}  {'kernel':<26} {'how':<20} {'MiB':>8} {'us':>9} {'% of copy':>10}")
    groups = [norms, activations, rotations, products, *([other_tiles] if arguments.sweep else [])]
    rows = []
    for tokens in arguments.tokens:
        for name, how, num_bytes, function in itertools.chain.from_iterable(group(tokens) for group in groups):
            try:
                time = microseconds(function)
            except triton.runtime.errors.OutOfResources as error:
                print(f"{tokens:>6}  {name:<26} {how:<20} {error}")
                continue
            share = num_bytes / time * 1e6 / bandwidth
            print(f"{tokens:>6}  {name:<26} {how:<20} {num_bytes / 2**20:8.1f} {time:9.1f} {share:10.1%}")
            row = {"tokens": tokens, "kernel": name, "how": how, "bytes": num_bytes, "us": time, "share": share}
            rows.append(row)
    if arguments.json:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "gpu": torch.cuda.get_device_name(),
            "copy_bytes_per_s": bandwidth,
            "versions": {
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in ("torch", "triton", "liger-kernel")},
            },
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
