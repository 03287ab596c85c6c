"""Seconds to load a 16-bit checkpoint and quantize it, beside those of others and of what limits it.

    python benchmarks/loading.py MODEL [--repeats 3] [--json benchmarks/results/loading.json]

MODEL is a folder of safetensors. Each load is that of a new process which has imported its code and used the GPU
before the clock starts. The files are read once before all, so that they come from the page cache where it holds them.

What is compared: `fourfold` (load_model), `transformers` (the same quantizer under `from_pretrained`, which reads by
itself), `unsloth` where it is installed. What limits: `reading` brings all tensors to the device and quantizes none,
`disk` reads the files into the buffers alone, `link` copies as many bytes from pinned memory.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

VERSIONS = ("torch", "triton", "transformers", "bitsandbytes", "unsloth", "unsloth_zoo")
MIB = 2**20


def fourfold(model: Path, device: str) -> Callable[[], object]:
    from fourfold import FourfoldConfig, load_model

    import_class(model)
    config = FourfoldConfig()
    return lambda: load_model(model, quantization=config, device=device)


def transformers(model: Path, device: str) -> Callable[[], object]:
    from transformers import AutoModelForCausalLM

    from fourfold import FourfoldConfig
    from fourfold.models.loading import default_dtype

    import_class(model)
    options = {"quantization_config": FourfoldConfig(), "device_map": {"": device}}
    dtype = default_dtype(_device(device))
    return lambda: AutoModelForCausalLM.from_pretrained(str(model), dtype=dtype, **options)


def import_class(model: Path) -> None:
    """Import the model's code: Unsloth has done so when it is imported itself."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(model))]


def unsloth(model: Path, device: str) -> Callable[[], object]:
    from unsloth import FastLanguageModel

    return lambda: FastLanguageModel.from_pretrained(str(model), max_seq_length=2048, load_in_4bit=True)


def reading(model: Path, device: str) -> Callable[[], object]:
    from fourfold.models.checkpoint_files import stored_tensors
    from fourfold.models.reading_ahead import ReadAhead, natural_key

    def read() -> None:
        stored = stored_tensors(model)
        assert stored is not None
        with ReadAhead(stored, _device(device)) as reader:
            for name in sorted(stored, key=natural_key):
                reader.take(name)

    return read


def disk(model: Path, device: str) -> Callable[[], object]:
    from fourfold.models.reading_ahead import CHUNK_BYTES, NUM_THREADS

    buffers = threading.local()

    def read(part: tuple[int, int]) -> None:
        if not hasattr(buffers, "memory"):
            buffers.memory = bytearray(CHUNK_BYTES)
        os.preadv(part[0], [buffers.memory], part[1])

    def read_all() -> None:
        files = {os.open(path, os.O_RDONLY): path.stat().st_size for path in model.glob("*.safetensors")}
        parts = [(file, start) for file, size in files.items() for start in range(0, size, CHUNK_BYTES)]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(read, parts))
        for file in files:
            os.close(file)

    return read_all


def link(model: Path, device: str) -> Callable[[], object]:
    import torch

    source = torch.empty(256 * MIB, dtype=torch.uint8, pin_memory=device != "cpu")
    target = torch.empty(source.shape, dtype=torch.uint8, device=device)
    copies = -(-num_bytes(model) // source.nbytes)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source, non_blocking=True)

    return copy


SYSTEMS = {f.__name__: f for f in (fourfold, transformers, unsloth, reading, disk, link)}


def _device(name: str) -> Any:
    import torch

    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def num_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


class PeakMemory:
    """The most anonymous memory of this process while the block runs: the host's memory beside the page cache."""

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = self._now()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.02):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def measure(system: str, model: Path, device: str) -> dict[str, float]:
    load = SYSTEMS[system](model, device)
    import torch

    if device == "cuda":
        torch.ones(1, device=device).sum().item()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with PeakMemory() as memory:
        start = time.perf_counter()
        loaded = load()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    del loaded
    return {
        "seconds": seconds,
        "anonymous_mib": (memory.peak - memory.before) / MIB,
        "resident_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
        "gpu_peak_mib": torch.cuda.max_memory_allocated() / MIB if device == "cuda" else 0.0,
    }


def in_process(system: str, model: Path, device: str) -> dict[str, float]:
    # -P: beside this script lies `kernels`, which is not the package of that name that the peers look for.
    command = [sys.executable, "-P", __file__, str(model), "--only", system, "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a 16-bit checkpoint")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--only", choices=list(SYSTEMS), help="measure one here, once, and print it as JSON")
    parser.add_argument("--json", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(measure(arguments.only, arguments.model, arguments.device)))
        return

    systems = [name for name in arguments.systems if name != "unsloth" or importlib.util.find_spec("unsloth")]
    for name in set(arguments.systems) - set(systems):
        print(f"{name}: not installed")
    in_process("disk", arguments.model, arguments.device)
    size = num_bytes(arguments.model)
    print(f"{size / 1e9:.2f} GB of files; each process:")
    heading = f"{'':>14} {'s':>7} {'least':>7} {'most':>7} {'GB/s':>6} {'host MiB':>9} {'resident':>9} {'GPU MiB':>8}"
    print(heading)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for _ in range(arguments.repeats):
        for name in systems:
            runs[name].append(in_process(name, arguments.model, arguments.device))
            print(line(size, row(name, runs[name][-1:])), flush=True)
            if arguments.json is not None:
                # After each: what is measured stays, should the time for the rest run out.
                write(arguments, size, [row(name, results) for name, results in runs.items() if results])
    print(f"median, and the most of memory:\n{heading}")
    for name, results in runs.items():
        print(line(size, row(name, results)))


def row(name: str, results: list[dict[str, float]]) -> dict[str, Any]:
    seconds = [result["seconds"] for result in results]
    most = {key: max(result[key] for result in results) for key in results[0] if key != "seconds"}
    return {"what": name, "seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds), **most}


def line(size: int, row: dict[str, Any]) -> str:
    return (
        f"{row['what']:>14} {row['seconds']:7.2f} {row['least']:7.2f} {row['most']:7.2f}"
        f" {size / row['seconds'] / 1e9:6.1f} {row['anonymous_mib']:9.0f} {row['resident_mib']:9.0f}"
        f" {row['gpu_peak_mib']:8.0f}"
    )


def write(arguments: argparse.Namespace, size: int, rows: list[dict[str, Any]]) -> None:
    report = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "device": device_name(arguments.device),
        "versions": versions(),
        "bytes": size,
        "rows": rows,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def versions() -> dict[str, str]:
    found = {name: importlib.util.find_spec(name) for name in VERSIONS}
    return {name: importlib.metadata.version(name) for name, spec in found.items() if spec is not None}


if __name__ == "__main__":
    main()
