"""Dequantization on the CPU: the native kernel, the PyTorch reference and bitsandbytes, interleaved.

    python benchmarks/kernels/blockwise_cpu.py [--repeats 15] [--out benchmarks/results/blockwise_cpu.json]

Each call takes codes and scales and allocates its result, as a layer of a model does; scales are
double-quantized in one half of the rows. "fill" writes a constant into a fresh tensor of the result's size,
which is what PyTorch's allocation and page faults cost; "copy" reads and writes as many bytes, both in place.
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

import bitsandbytes.functional
import torch
from torch import Tensor

from fourfold.kernels import blockwise
from fourfold.kernels.blockwise_cpu import cpu_kernel

SHAPES = [(576, 192), (576, 576), (1536, 576), (4096, 4096), (14336, 4096)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RESULTS = Path(__file__).parents[1] / "results" / "blockwise_cpu.json"


def candidates(shape: tuple[int, int], dtype: torch.dtype, double_quant: bool) -> dict[str, Callable[[], Tensor]]:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    source, target = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def ours(dequantize: Callable[..., Tensor], dequantize_scales: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            absmax = state.absmax
            if double_quant:
                nested = state.state2
                absmax = dequantize_scales(absmax, nested.code, nested.absmax, state.offset, nested.blocksize)
            return dequantize(codes, state.code, absmax, 64, list(shape), dtype)

        return run

    return {
        "native": ours(blockwise.dequantize_blockwise, blockwise.dequantize_scales),
        "reference": ours(blockwise.dequantize_blockwise_reference, blockwise.dequantize_scales_reference),
        "bitsandbytes": lambda: bitsandbytes.functional.dequantize_4bit(codes, state),
        "fill": lambda: torch.full(shape, 1.0, dtype=dtype),
        "copy": lambda: target.copy_(source),
    }


def measure(functions: dict[str, Callable[[], Tensor]], num_elements: int, repeats: int) -> dict[str, dict[str, float]]:
    """Microseconds a call, median and least of `repeats` rounds that run every candidate in turn."""
    calls = max(1, min(100, 2_000_000 // num_elements))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(calls):
                function()
            times[name].append((time.perf_counter() - start) / calls * 1e6)
    return {name: {"median_us": statistics.median(t), "min_us": min(t)} for name, t in times.items()}


def processor() -> str:
    """The processor's name where Linux tells it, and the vector instructions that PyTorch uses on it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds a row (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the JSON goes (default: %(default)s)")
    arguments = parser.parse_args()
    if cpu_kernel() == "reference":
        sys.exit("the native kernel is not built: reinstall where there is a C compiler")

    names = ["native", "reference", "bitsandbytes", "fill", "copy"]
    print(f"least microseconds a call / ns a weight; native: {cpu_kernel()}, {torch.get_num_threads()} threads")
    print(f"{'shape':>12} {'dtype':>9} {'scales':>7} " + " ".join(f"{name:>17}" for name in names) + "  ratio")
    rows = []
    for shape in SHAPES:
        for double_quant in (False, True):
            for dtype in DTYPES:
                num_elements = shape[0] * shape[1]
                functions = candidates(shape, dtype, double_quant)
                assert torch.equal(functions["native"](), functions["bitsandbytes"]())
                times = measure(functions, num_elements, arguments.repeats)
                least = {name: times[name]["min_us"] for name in names}
                name, scales = str(dtype).removeprefix("torch."), "double" if double_quant else "fp32"
                cells = [f"{least[n]:9.1f} / {least[n] * 1e3 / num_elements:5.3f}" for n in names]
                ratio = least["bitsandbytes"] / least["native"]
                print(f"{shape[0]:>6}x{shape[1]:<5} {name:>9} {scales:>7} " + " ".join(cells) + f"  {ratio:5.2f}")
                rows.append({"shape": shape, "dtype": name, "scales": scales, **times})

    report = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "kernel": cpu_kernel(),
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in ("torch", "bitsandbytes")},
        },
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
