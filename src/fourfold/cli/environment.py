"""What this machine has: versions, processor, memory, GPUs, and what to do when something is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["Environment", "Gpu", "gather", "let_segments_grow", "print_environment"]

# Distribution -> why it is there. None: part of every installation.
PACKAGES: dict[str, str | None] = {
    "fourfold": None,
    "torch": None,
    "triton": "torch's own compiler for GPUs",
    "transformers": None,
    "peft": None,
    "trl": None,
    "accelerate": None,
    "datasets": None,
    "safetensors": None,
    "bitsandbytes": "the tests' reference",
}

# Read by torch when it is first imported: settings of its allocator for GPUs.
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

CPU_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 twice, then Arm
FIRST_GPU_WITH_BFLOAT16 = (8, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU. `compute_capability` is NVIDIA's, such as "9.0"; empty for others."""

    name: str
    memory_bytes: int
    compute_capability: str
    driver: str


@dataclass(frozen=True)
class Environment:
    """`memory_bytes` is what this process may use: the machine's, or its container's limit."""

    python: str
    versions: dict[str, str | None]
    os: str
    cpu: str
    cpu_cores: int
    memory_bytes: int
    gpus: list[Gpu]
    torch_cuda: str | None
    bfloat16_is_fast: bool
    advice: list[str]


def let_segments_grow() -> None:
    """Have torch's allocator for GPUs extend its segments in place, unless its settings are given: between large
    tensors of changing sizes, such as those of long rows, a seventh of the memory would lie idle otherwise."""
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def gather() -> Environment:
    """Look at the machine. Imports torch if it is installed, and touches no GPU's memory."""
    versions = {name: _version(name) for name in PACKAGES}
    gpus = _nvidia_gpus()
    torch_cuda: str | None = None
    cuda_is_available = False
    if versions["torch"] is not None:
        import torch

        torch_cuda = torch.version.cuda or torch.version.hip
        cuda_is_available = torch.cuda.is_available()
        if cuda_is_available and not gpus:
            gpus = [_torch_gpu(index) for index in range(torch.cuda.device_count())]
    return Environment(
        python=platform.python_version(),
        versions=versions,
        os=platform.platform(),
        cpu=_cpu_model(),
        cpu_cores=len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        gpus=gpus,
        torch_cuda=torch_cuda,
        bfloat16_is_fast=_bfloat16_is_fast(gpus),
        advice=_advice(versions, gpus, torch_cuda, cuda_is_available),
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_gpus() -> list[Gpu]:
    """From nvidia-smi, which answers even when torch is a CPU build. Without it: no NVIDIA driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [
        command,
        "--query-gpu=name,memory.total,compute_cap,driver_version",
        "--format=csv,noheader,nounits",
    ]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if answer.returncode != 0:
        return []
    return [_parse_gpu(line) for line in answer.stdout.splitlines() if line.strip()]


def _parse_gpu(line: str) -> Gpu:
    name, mebibytes, compute_capability, driver = (part.strip() for part in line.split(","))
    # A GPU that shares the machine's memory reports "[N/A]".
    memory_bytes = int(mebibytes) * 2**20 if mebibytes.isdigit() else _memory_bytes()
    return Gpu(name, memory_bytes, compute_capability, driver)


def _torch_gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    capability = "" if torch.version.hip else f"{properties.major}.{properties.minor}"
    return Gpu(properties.name, properties.total_memory, capability, driver="")


def _cpu_fields() -> dict[str, str]:
    """The first processor's fields of Linux's /proc/cpuinfo; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_model() -> str:
    return _cpu_fields().get("model name") or platform.processor() or platform.machine()


def _memory_bytes() -> int:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2: a number, or "max"
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _bfloat16_is_fast(gpus: list[Gpu]) -> bool:
    if not gpus:
        fields = _cpu_fields()
        flags = set((fields.get("flags") or fields.get("Features") or "").split())
        return bool(flags & CPU_BFLOAT16_FLAGS)
    capabilities = [gpu.compute_capability for gpu in gpus if gpu.compute_capability]
    return all(tuple(map(int, text.split("."))) >= FIRST_GPU_WITH_BFLOAT16 for text in capabilities)


def _advice(
    versions: dict[str, str | None], gpus: list[Gpu], torch_cuda: str | None, cuda_is_available: bool
) -> list[str]:
    advice = [
        f"{name} is missing: install fourfold again with `pip install fourfold`"
        for name, purpose in PACKAGES.items()
        if purpose is None and versions[name] is None and name != "fourfold"
    ]
    if gpus and versions["torch"] is not None and torch_cuda is None:
        advice.append("there is a GPU, but torch is a CPU build: install torch's CUDA build")
    elif gpus and torch_cuda is not None and not cuda_is_available:
        driver = gpus[0].driver
        advice.append(f"torch (CUDA {torch_cuda}) cannot use the GPU: update the driver (now {driver})")
    if not gpus:
        advice.append("no GPU was found: runs take the CPU, which is right for small models only")
    return advice


def print_environment(environment: Environment) -> None:
    """Print it as a table, with advice below."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("python", environment.python)
    for name, version in environment.versions.items():
        purpose = PACKAGES[name]
        missing = "not installed" if purpose is None else f"not installed ({purpose})"
        table.add_row(name, version or missing)
    table.add_row("system", environment.os)
    table.add_row("processor", Text(f"{environment.cpu}, {environment.cpu_cores} cores"))
    table.add_row("memory", f"{environment.memory_bytes / 2**30:.1f} GiB")
    for index, gpu in enumerate(environment.gpus):
        details = f"{gpu.memory_bytes / 2**30:.1f} GiB"
        if gpu.compute_capability:
            details += f", compute capability {gpu.compute_capability}"
        if gpu.driver:
            details += f", driver {gpu.driver}"
        table.add_row(f"GPU {index}", Text(f"{gpu.name}, {details}"))
    table.add_row("torch built for", f"GPU ({environment.torch_cuda})" if environment.torch_cuda else "CPU")
    table.add_row("bfloat16", "fast" if environment.bfloat16_is_fast else "slow here; float32 is faster")
    Console().print(table)
    for advice in environment.advice:
        typer.secho(f"\n{advice[0].upper()}{advice[1:]}.", fg=typer.colors.YELLOW)
