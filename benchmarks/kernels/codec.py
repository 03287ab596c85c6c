"""The 4-bit codec on a GPU: ours, bitsandbytes and the limits, in one run.

    python benchmarks/kernels/codec.py [--json benchmarks/results/codec.json]

Weights are NF4 with double quantization, in bf16. The limit of decoding and encoding is the bandwidth of a copy within
the GPU, of few-row products the bf16 GEMM. Every call takes the next of several sets of buffers, so that nothing that
it reads is left in the L2 cache by the call before. Many calls are timed as one, so that what an event takes does not
count.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import bitsandbytes.functional
import torch
from torch import Tensor

from fourfold.kernels import blockwise_triton
from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.small_batch import matmul_4bit
from fourfold.quantization.tensor import QuantizedTensor, expand_alike_, quantize

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)]
# Linears of Llama-3-8B that share their input, as rows of each and columns.
GROUPS = {"q, k, v": ([4096, 1024, 1024], 4096), "gate, up": ([14336, 14336], 4096)}
BATCHES = [1, 4, 8, 16, 32, 48, 64]
REPEATS = 5
CALLS = 20
RANK = 16
# More than twice the L2 cache of any GPU so far.
ROTATED_BYTES = 256 * 2**20


def median_us(calls: list[Callable[[], Any]]) -> float:
    """Microseconds of a call, taking the calls in turn: the median of REPEATS times CALLS of them."""
    turn = itertools.cycle(calls)
    for _ in range(3):
        next(turn)()
    filler = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Filling takes the GPU longer than the CPU takes to launch the calls, so that only the GPU is timed.
        for _ in range(16):
            filler.zero_()
        start.record()
        for _ in range(CALLS):
            next(turn)()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_us([lambda: target.copy_(source)])


def nested_of(weight: QuantizedTensor) -> tuple[Tensor, blockwise_triton.NestedParts]:
    scales: Any = weight.scales
    parts = (scales.code_map, scales.nested_absmax, scales.offset, scales.nested_block_size)
    return scales.codes, blockwise_triton.NestedParts(*parts)


def decoding(shape: tuple[int, int], bandwidth: float) -> list[dict[str, Any]]:
    """Dequantization, expansion with an adapter, and quantization."""
    dense = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies(shape))]
    weights = [quantize(tensor) for tensor in dense]
    theirs = [
        bitsandbytes.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True) for tensor in dense
    ]
    assert torch.equal(quantize(dense[0]).dequantize(), bitsandbytes.functional.dequantize_4bit(*theirs[0]))
    rows, columns = shape

    def dequantize(weight: QuantizedTensor) -> Callable[[], Any]:
        codes, nested = nested_of(weight)
        options = (codes, 64, list(shape), torch.bfloat16, nested)
        return lambda: blockwise_triton.dequantize(weight.codes, weight.codebook, *options)

    def by_bitsandbytes(codes: Tensor, state: Any) -> Callable[[], Any]:
        return lambda: bitsandbytes.functional.dequantize_4bit(codes, state)

    def quantize_by_bitsandbytes(tensor: Tensor) -> Callable[[], Any]:
        return lambda: bitsandbytes.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True)

    moved = 2 * rows * columns + weights[0].num_bytes
    times = {
        "dequantize": [dequantize(weight) for weight in weights],
        "dequantize, bitsandbytes": [by_bitsandbytes(*pair) for pair in theirs],
        "expand": expansions([[weight] for weight in weights])["at once"],
        "quantize": [lambda tensor=tensor: quantize(tensor) for tensor in dense],
        "quantize, bitsandbytes": [quantize_by_bitsandbytes(tensor) for tensor in dense],
    }
    return [
        {"shape": shape, "what": what, "us": (us := median_us(calls)), "of_copy_bandwidth": moved / us / bandwidth}
        for what, calls in times.items()
    ]


def expansions(groups: list[list[QuantizedTensor]]) -> dict[str, list[Callable[[], Any]]]:
    """Calls that write a group of weights and adapters, one for each of `groups`: at once, and a weight at a time."""
    rows, columns = [weight.shape[0] for weight in groups[0]], groups[0][0].shape[1]
    ranks = RANK * len(rows)
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    outs = [new_extended(like, sum(rows) + ranks, columns, ranks) for _ in groups]
    a = [torch.randn(RANK, columns, device="cuda") for _ in rows]
    b = [torch.randn(count, RANK, device="cuda") for count in rows]

    def at_once(out: Tensor, weights: list[QuantizedTensor]) -> Callable[[], Any]:
        return lambda: expand_alike_(out, weights, a, b, [2.0] * len(weights))

    def one_by_one(out: Tensor, weights: list[QuantizedTensor]) -> Callable[[], Any]:
        def call() -> None:
            row = 0
            for index, weight in enumerate(weights):
                place: dict[str, Any] = {"row": row, "total_rows": sum(rows), "rank_row": RANK * index}
                weight.expand_(out, used_ranks=ranks, lora_a=a[index], lora_b=b[index], scaling=2.0, **place)
                row += rows[index]

        return call

    pairs = list(zip(outs, groups, strict=True))
    return {"at once": [at_once(*pair) for pair in pairs], "one by one": [one_by_one(*pair) for pair in pairs]}


def group_expansion(name: str, rows: list[int], columns: int, bandwidth: float) -> list[dict[str, Any]]:
    """Expansion of linears that share their input, in one launch and in one each."""
    groups = [
        [quantize(torch.randn(count, columns, dtype=torch.bfloat16, device="cuda")) for count in rows]
        for _ in range(copies((sum(rows), columns)))
    ]
    moved = 2 * sum(rows) * columns + sum(weight.num_bytes for weight in groups[0])
    return [
        {
            "shape": (sum(rows), columns),
            "what": f"expand {name}, {how}",
            "us": (us := median_us(calls)),
            "of_copy_bandwidth": moved / us / bandwidth,
        }
        for how, calls in expansions(groups).items()
    ]


def copies(shape: tuple[int, int]) -> int:
    """Sets of buffers whose codes alone fill ROTATED_BYTES."""
    return min(32, max(2, ROTATED_BYTES // (shape[0] * shape[1] // 2)))


def products(shape: tuple[int, int]) -> list[dict[str, Any]]:
    """Products of few rows, against bitsandbytes and the bf16 GEMM."""
    rows, columns = shape
    dense = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies(shape))]
    weights = [quantize(tensor) for tensor in dense]
    theirs = [
        bitsandbytes.functional.quantize_4bit(tensor, quant_type="nf4", compress_statistics=True) for tensor in dense
    ]

    def ours(weight: QuantizedTensor, x: Tensor) -> Callable[[], Any]:
        codes, nested = nested_of(weight)
        parts = (codes, nested.code_map, nested.nested_absmax, nested.offset, 64, nested.block_size, rows)
        return lambda: matmul_4bit(x, weight.codes, weight.codebook, *parts)

    def by_bitsandbytes(x: Tensor, codes: Tensor, state: Any) -> Callable[[], Any]:
        return lambda: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)

    results = []
    for batch in BATCHES:
        x = torch.randn(batch, columns, dtype=torch.bfloat16, device="cuda")
        times = {
            "ours": [ours(weight, x) for weight in weights],
            "bitsandbytes": [by_bitsandbytes(x, *pair) for pair in theirs],
            "bf16": [lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in dense],  # noqa: B023
        }
        results.append(
            {"shape": shape, "batch": batch, "us": {name: median_us(calls) for name, calls in times.items()}}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the results go, with the versions")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth / 1e6:.2f} TB/s")
    print(f"{'shape':>12} {'what':>28} {'us':>9} {'of copy':>8}")
    codec, small = [], []
    decoded = (row for shape in SHAPES for row in decoding(shape, bandwidth))
    grouped = (row for name, group in GROUPS.items() for row in group_expansion(name, *group, bandwidth))
    for row in itertools.chain(decoded, grouped):
        codec.append(row)
        rows, columns = row["shape"]
        print(f"{rows:>6}x{columns:<5} {row['what']:>28} {row['us']:9.1f} {row['of_copy_bandwidth']:8.1%}")
    names = ["ours", "bitsandbytes", "bf16"]
    print(f"{'shape':>12} {'rows of x':>10} " + " ".join(f"{name:>13}" for name in names) + "   (us)")
    for shape in SHAPES:
        for row in products(shape):
            small.append(row)
            cells = " ".join(f"{row['us'][name]:13.1f}" for name in names)
            print(f"{shape[0]:>6}x{shape[1]:<5} {row['batch']:>10} {cells}")
    if arguments.json:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "device": torch.cuda.get_device_name(),
            "copy_tb_s": bandwidth / 1e6,
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in ("torch", "triton", "bitsandbytes")},
            },
            "codec": codec,
            "small_batch": small,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
