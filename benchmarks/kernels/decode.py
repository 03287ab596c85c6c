"""The kernels of a decode step on a GPU, in the shapes of Llama-3-8B, beside what they must read.

    python benchmarks/kernels/decode.py [--rows 1 8 32 64] [--json benchmarks/results/decode_kernels.json]

Weights are NF4 with double quantization, adapters of rank 16. Every kernel is first held against float64, and
its reference is. Then many calls are captured as one CUDA graph, each with the next of
several sets of weights, so that nothing is left in the L2 cache by the call before; shares are of the bandwidth, read
and written, of a copy in the same run, and at one row also of launches that read as many bytes and do nothing with them
(`reading_triton.py`). What fails is printed, and leaves the rest alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from reading_triton import reading_us
from torch import Tensor

from fourfold.kernels import decode_attention_triton, decode_linear_triton, decode_norm_triton
from fourfold.kernels.decode_attention import decode_attention_reference_
from fourfold.kernels.decode_linear import decode_linear_reference
from fourfold.kernels.decode_norm import decode_norm_reference
from fourfold.kernels.decode_tiles import Tile
from fourfold.kernels.small_batch import matmul_4bit
from fourfold.quantization.formats import get_format
from fourfold.quantization.scales import NestedScales

BF16, F16 = torch.bfloat16, torch.float16
RANK = 16
# More than twice the L2 cache of any GPU so far.
ROTATED_BYTES = 160 * 2**20
REPEATS = 7


class Layer:
    """Members that share an input: `linears` arguments of `decode_linear`, drawn."""

    def __init__(self, rows: list[int], columns: int, *, gated: bool = False, residual: bool = False) -> None:
        self.rows, self.columns, self.gated, self.has_residual = rows, columns, gated, residual
        nf4 = get_format("nf4")
        self.codebook = nf4.codebook(torch.device("cuda"))
        self.codes, self.scales = [], []
        for count in rows:
            size = count * columns
            self.codes.append(torch.randint(0, 256, (size // 2, 1), dtype=torch.uint8, device="cuda"))
            absmax = 2 / columns**0.5 * (0.8 + 0.4 * torch.rand(size // 64, device="cuda"))
            self.scales.append(NestedScales.quantize(absmax))
        self.up = torch.randn(sum(rows), RANK, device="cuda").to(BF16)

    @property
    def num_bytes(self) -> int:
        """What a call must read."""
        return sum(one.nbytes for one in self.codes) + sum(one.num_bytes for one in self.scales) + self.up.nbytes

    def weights(self) -> tuple[Any, ...]:
        scales = self.scales
        nested = ([one.nested_absmax for one in scales], [one.offset for one in scales])
        return (self.codes, self.codebook, [one.codes for one in scales], scales[0].code_map, *nested, 256, self.rows)

    def extras(self, inputs: int) -> tuple[Any, ...]:
        """bias, residual, low, up, activation and scales."""
        low = torch.randn(inputs, RANK * len(self.rows), device="cuda").to(BF16) * 0.05
        residual = torch.randn(inputs, sum(self.rows), device="cuda").to(BF16) if self.has_residual else None
        return (None, residual, low, self.up, "silu" if self.gated else "", 1.0, 1.0, BF16)


LAYERS: dict[str, dict[str, Any]] = {
    "qkv": {"rows": [4096, 1024, 1024], "columns": 4096},
    "o": {"rows": [4096], "columns": 4096, "residual": True},
    "gate_up": {"rows": [14336, 14336], "columns": 4096, "gated": True},
    "down": {"rows": [4096], "columns": 14336, "residual": True},
}
# name -> what the launcher is told, for the sizes named; the first is the default.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "default": ({}, (1, 8, 32, 64)),
    "no early launch": ({"early": False}, (1, 8, 32, 64)),
    "lookup by shuffles": ({"lookup": "shuffle"}, (1,)),
}
# With --tiles: what `tile_for` chooses from.
TILES: dict[int, list[Tile]] = {
    1: [
        *(
            Tile(8, 16, *warps, registers)
            for warps in ((1, 4), (1, 8), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1))
            for registers in (None, 128, 96)
        ),
        *(Tile(8, 16, 1, warps, 128, tiles) for warps, tiles in ((8, 2), (8, 4), (8, 7), (4, 4))),
    ],
    8: [Tile(8, 16, *warps, registers) for warps in ((1, 4), (1, 8), (2, 2), (4, 1)) for registers in (None, 96)],
    32: [
        *(Tile(32, rows, *warps) for rows in (16, 32) for warps in ((1, 4), (2, 2), (4, 1))),
        *(Tile(32, 16, 2, 4, registers) for registers in (None, 160)),
    ],
    64: [Tile(32, 32, *warps) for warps in ((1, 4), (2, 2), (4, 1))],
}


def variants(inputs: int, tiles: bool) -> dict[str, dict[str, Any]]:
    found = {name: told for name, (told, at) in VARIANTS.items() if inputs in at}
    if tiles:
        found |= {str(tuple(tile)): {"tile": tile} for tile in TILES.get(inputs, [])}
    return found


def graph_us(calls: list[Callable[[], Any]], least: int = 32) -> float:
    """Microseconds of a call, in a graph of all calls, over and over: the median of REPEATS."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    rounds = max(1, least // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(REPEATS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times[1:])


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of copies of 1 GiB; not in a graph, whose copies are slower."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 20 * source.numel() / (start.elapsed_time(end) * 1e3)


def distance(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def linear_rows(name: str, sizes: list[int], bandwidth: float, tiles: bool) -> list[dict[str, Any]]:
    options = LAYERS[name]
    first = Layer(**options)
    layers = [first, *(Layer(**options) for _ in range(ROTATED_BYTES // first.num_bytes))]
    found: list[dict[str, Any]] = []
    for inputs in sizes:
        x = torch.randn(inputs, first.columns, device="cuda").to(BF16).to(F16)
        extras = [layer.extras(inputs) for layer in layers]
        exact = decode_linear_reference(x.double(), *first.weights(), *extras[0][:-1], torch.float64)
        reading = reading_us(first.num_bytes, ROTATED_BYTES, graph_us) if inputs == 1 else None
        rounded = decode_linear_reference(x, *first.weights(), *extras[0])
        for variant, told in variants(inputs, tiles).items():
            row: dict[str, Any] = {"what": name, "rows": inputs, "variant": variant}
            try:
                calls = [
                    partial(decode_linear_triton.decode_linear, x, *layer.weights(), *extra, **told)
                    for layer, extra in zip(layers, extras, strict=True)
                ]
                row["error"] = distance(calls[0](), exact)
                row["reference_error"] = distance(rounded, exact)
                row["us"] = graph_us(calls)
                row["of_copy"] = first.num_bytes / row["us"] / bandwidth
                if reading is not None:
                    row["of_reading"] = reading / row["us"]
            except Exception:
                traceback.print_exc()
                row["failed"] = traceback.format_exc(limit=1).strip().splitlines()[-1]
            found.append(row)
            print(row, flush=True)
        found += small_batch_rows(name, layers, inputs, bandwidth)
    return found


def small_batch_rows(name: str, layers: list[Layer], inputs: int, bandwidth: float) -> list[dict[str, Any]]:
    """The same products, without adapters and what follows, by `matmul_4bit`, layer by layer."""
    x = torch.randn(inputs, layers[0].columns, device="cuda").to(BF16)

    def call(layer: Layer) -> None:
        for codes, scales, rows in zip(layer.codes, layer.scales, layer.rows, strict=True):
            parts = (scales.codes, scales.code_map, scales.nested_absmax, scales.offset)
            matmul_4bit(x, codes, layer.codebook, *parts, 64, 256, rows)

    us = graph_us([partial(call, layer) for layer in layers])
    share = layers[0].num_bytes / us / bandwidth
    return [{"what": name, "rows": inputs, "variant": "matmul_4bit, bare", "us": us, "of_copy": share}]


def attention_rows(sizes: list[int], bandwidth: float) -> list[dict[str, Any]]:
    found = []
    heads, kv_heads, dim, length = 32, 8, 128, 1024
    for inputs in sizes:
        shape = (2, inputs, kv_heads, length, dim)
        count = max(1, ROTATED_BYTES // (2 * inputs * kv_heads * length * dim))
        caches = [torch.randn(shape, device="cuda").to(BF16) for _ in range(min(count, 32))]
        qkv = torch.randn(inputs, (heads + 2 * kv_heads) * dim, device="cuda").to(BF16)
        angle = torch.rand(inputs, dim // 2, device="cuda").repeat(1, 2)
        cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
        slots = torch.randperm(inputs, device="cuda")
        for position in (512, 1000):
            positions = torch.full((inputs,), position, device="cuda") - torch.arange(inputs, device="cuda")
            for early in (True, False):
                options = (slots, positions, dim**-0.5, None, None, None, 0.0, True)
                row: dict[str, Any] = {"what": f"attention, {position} keys", "rows": inputs}
                row["variant"] = "default" if early else "no early launch"
                try:
                    ours = decode_attention_triton.decode_attention_(
                        qkv, cos, sin, *caches[0].clone(), *options, early=early
                    )
                    exact = decode_attention_reference_(qkv, cos, sin, *caches[0].clone(), *options)
                    row["error"] = distance(ours, exact)

                    attend = partial(decode_attention_triton.decode_attention_, qkv, cos, sin)
                    row["us"] = graph_us([partial(attend, *cache, *options, early=early) for cache in caches])
                    seen = int(positions.sum())
                    row["of_copy"] = 4 * seen * kv_heads * dim / row["us"] / bandwidth
                except Exception:
                    traceback.print_exc()
                    row["failed"] = traceback.format_exc(limit=1).strip().splitlines()[-1]
                found.append(row)
                print(row, flush=True)
    return found


def norm_rows(sizes: list[int], bandwidth: float) -> list[dict[str, Any]]:
    found = []
    for inputs in sizes:
        x, weight = torch.randn(inputs, 4096, device="cuda").to(BF16), torch.rand(4096, device="cuda").to(BF16)
        wide = torch.randn(inputs, 14336, device="cuda").to(F16)
        lora_a = torch.randn(3 * RANK, 4096, device="cuda").to(BF16)
        wide_a = torch.randn(RANK, 14336, device="cuda").to(BF16)
        expected = decode_norm_reference(x, weight, 1e-5, lora_a)
        ours = decode_norm_triton.decode_norm(x, weight, 1e-5, lora_a)
        error = max(distance(one, other) for one, other in zip(ours, expected, strict=True))
        calls: dict[str, Callable[[], Any]] = {
            "norm": partial(decode_norm_triton.decode_norm, x, weight, 1e-5, None),
            "norm and 48 ranks": partial(decode_norm_triton.decode_norm, x, weight, 1e-5, lora_a),
            "16 ranks of 14336": partial(decode_norm_triton.low_products, wide, wide_a, 1.0, BF16),
        }
        for what, call in calls.items():
            found.append({"what": what, "rows": inputs, "variant": "default", "us": graph_us([call]), "error": error})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tiles", action="store_true", help="every tile beside the one that is chosen")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    start, bandwidth = time.perf_counter(), copy_bandwidth()
    found: list[dict[str, Any]] = []
    parts: list[Callable[[], list[dict[str, Any]]]] = [
        *(partial(linear_rows, name, args.rows, bandwidth, args.tiles) for name in LAYERS),
        partial(attention_rows, args.rows, bandwidth),
        partial(norm_rows, args.rows, bandwidth),
    ]
    for part in parts:
        try:
            found += part()
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
    about = {
        "command": shlex.join(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "copy_bytes_per_us": bandwidth,
        "seconds": time.perf_counter() - start,
    }
    if args.json:
        args.json.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    print(f"\n{about['gpu']}, copy {bandwidth / 1e6:.2f} TB/s, {about['seconds']:.0f} s")
    keys = ("us", "of_copy", "of_reading", "error", "reference_error")
    titles = f"{'us':>8} {'of copy':>8} {'of reading':>10} {'error':>9} {'reference':>9}"
    print(f"{'what':24} {'rows':>4} {'variant':20} {titles}")
    for row in found:
        if "failed" in row:
            print(f"{row['what']:24} {row['rows']:4} {row['variant']:20} FAILED {row['failed'][:90]}")
            continue
        us, share, reading, error, reference = (row.get(key, float("nan")) for key in keys)
        told = f"{us:8.2f} {share:8.1%} {reading:10.1%} {error:9.1e} {reference:9.1e}"
        print(f"{row['what']:24} {row['rows']:4} {row['variant']:20} {told}")


if __name__ == "__main__":
    main()
