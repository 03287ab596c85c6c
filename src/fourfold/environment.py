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

__all__ = ["PACKAGES", "Environment", "Gpu", "gather"]

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
