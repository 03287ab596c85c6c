"""GPUs by name: what a plan needs to know of one that is not there."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from fourfold.errors import ConfigError

__all__ = [
    "GPUS",
    "Gpu",
    "context_bytes",
    "device_index",
    "gpu_by_name",
    "gpu_present",
    "parse_bytes",
    "require_possible",
    "split_count",
]

GIB = 2**30
# Context, code and libraries of a process, outside what torch's allocator holds: 0.7 GiB on an H200, as
# benchmarks/cards.py measures it, and less on smaller GPUs.
CONTEXT_BYTES = 768 * 2**20
LARGEST_CONTEXT_BYTES = 1024 * 2**20
# Of the allocator's memory, what lies between tensors: some of each pool (streams and graphs have their own), and a
# share of all. Where memory is short it gives back what is cached and asks again, so that this is less than the gap
# between "reserved" and "allocated" of a run that has room.
POOLS_BYTES, FRAGMENTATION = 64 * 2**20, 0.04


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Args:
        name: As its maker calls it.
        memory_bytes: All of it.
        matmul_rate: Dense bf16 products, floating-point operations a second, of the data sheet.
        memory_rate: Bytes a second, of the data sheet.
        link_rate: Bytes a second to and from the host, one way.
        peer_rate: Bytes a second to and from other GPUs, one way; None: over the link to the host.
        context_bytes: What a process takes of it outside torch's allocator.
    """

    name: str
    memory_bytes: int
    matmul_rate: float
    memory_rate: float
    link_rate: float
    peer_rate: float | None = None
    context_bytes: int = CONTEXT_BYTES

    @property
    def usable_bytes(self) -> int:
        """What tensors may take at most: without the context, and what lies between them."""
        return int((self.memory_bytes - self.context_bytes - POOLS_BYTES) / (1 + FRAGMENTATION))

    def with_usable(self, num_bytes: int) -> Gpu:
        """The same GPU with so much for tensors."""
        return replace(self, memory_bytes=int(num_bytes * (1 + FRAGMENTATION)) + POOLS_BYTES + self.context_bytes)


# Data sheets: dense bf16 tensor-core rate with fp32 sums, memory rate, and 80% of PCIe's and of NVLink's. Bridges that
# one can buy for a card are not counted.
GPUS: dict[str, Gpu] = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("RTX 3060", 12 * GIB, 51e12, 360e9, 25e9),
        Gpu("RTX 3090", 24 * GIB, 71e12, 936e9, 25e9),
        Gpu("RTX 4060 Ti", 16 * GIB, 88e12, 288e9, 12e9),
        Gpu("RTX 4080", 16 * GIB, 97e12, 717e9, 25e9),
        Gpu("RTX 4090", 24 * GIB, 165e12, 1008e9, 25e9),
        Gpu("RTX 5090", 32 * GIB, 210e12, 1792e9, 50e9),
        Gpu("A10", 24 * GIB, 125e12, 600e9, 25e9),
        Gpu("L4", 24 * GIB, 121e12, 300e9, 25e9),
        Gpu("L40S", 48 * GIB, 362e12, 864e9, 25e9),
        Gpu("A6000", 48 * GIB, 155e12, 768e9, 25e9),
        Gpu("A100 40GB", 40 * GIB, 312e12, 1555e9, 25e9, 240e9),
        Gpu("A100 80GB", 80 * GIB, 312e12, 2039e9, 25e9, 240e9),
        Gpu("H100", 80 * GIB, 989e12, 3350e9, 50e9, 360e9),
        Gpu("H200", 140 * GIB, 989e12, 4800e9, 50e9, 360e9),
    )
}
# Where only an amount is given: a card of that class.
_BY_MEMORY = ((12, "rtx 3060"), (16, "rtx 4080"), (24, "rtx 4090"), (32, "rtx 5090"), (48, "l40s"), (80, "a100 80gb"))


def gpu_by_name(text: str) -> Gpu:
    """A GPU by its name, or by its memory: "H200", "rtx 4090", "24GB", "7.5 GiB".

    A GB is taken as 2**30 bytes, as makers of cards do.

    Raises:
        ConfigError: Neither.
    """
    wanted = re.sub(r"[\s_-]+", " ", text.strip().lower()).removeprefix("nvidia ").removeprefix("geforce ")
    for name, gpu in GPUS.items():
        if wanted.replace(" ", "") == name.replace(" ", ""):
            return gpu
    try:
        size = parse_bytes(text)
    except ConfigError:
        known = [gpu.name for gpu in GPUS.values()]
        raise ConfigError("unknown GPU", found=text, allowed=known, hint="or its memory: 24GB") from None
    like = next((name for least, name in _BY_MEMORY if size <= least * GIB), "h200")
    return replace(GPUS[like], name=f"{size / GIB:g} GB, as fast as an {GPUS[like].name}", memory_bytes=size)


def split_count(text: str) -> tuple[int, str]:
    """How many GPUs, and which: (2, "H200") of "2xH200", (1, "24GB") of "24GB"."""
    counted = re.fullmatch(r"(\d+)\s*x\s*(\S.*)", text.strip(), re.IGNORECASE)
    return (int(counted[1]), counted[2]) if counted else (1, text)


def parse_bytes(text: str) -> int:
    """Bytes of "24GB", "7.5 GiB" or "80g", a GB taken as 2**30 bytes.

    Raises:
        ConfigError: No such amount.
    """
    amount = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:gb|gib|g)", text.strip().lower())
    if amount is None or float(amount[1]) <= 0:
        raise ConfigError("no amount of memory", found=text, allowed="24GB, 7.5 GiB and the like")
    return int(float(amount[1]) * GIB)


def gpu_present(device: torch.device | None = None, limit: int | None = None, *, held_bytes: int = 0) -> Gpu | None:
    """The GPU that is there, less what others hold of it; None without one.

    Others are other processes, and whoever holds tensors in this one. A cap on torch's allocator that stands already
    (`torch.cuda.set_per_process_memory_fraction`) counts as the end of the GPU.

    Args:
        device: Which; None: the current one.
        limit: Bytes of it that this process may take, its context included; None: all.
        held_bytes: Tensors of this process that are no others'.

    Raises:
        ConfigError: A limit above what the GPU has, or one that leaves nothing for tensors.
    """
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    free, total = torch.cuda.mem_get_info(device)
    context = context_bytes(device)
    known = [gpu for key, gpu in GPUS.items() if key.replace(" ", "") in name.lower().replace(" ", "")]
    like = max(known, key=lambda gpu: len(gpu.name), default=None) or gpu_by_name(f"{total / GIB:.0f}GB")
    # Of what is not free, some is this process's already.
    reachable = free + torch.cuda.memory_reserved(device) + context
    capped = int(torch.cuda.get_per_process_memory_fraction(device_index(device)) * total) + context
    if limit is not None:
        require_possible(limit, name, total, context)
        name = f"{limit / GIB:g} GB of an {name}"
    end = min(total, reachable, capped, total if limit is None else limit)
    others = max(0, torch.cuda.memory_allocated(device) - held_bytes)
    return replace(like, name=name, memory_bytes=end - others, context_bytes=context)


def context_bytes(device: torch.device | int | None = None) -> int:
    """What this process takes of a GPU outside torch's allocator: context, code, libraries.

    CUDA tells what all processes hold together, and not whose it is (NVML does, outside of containers). All that is in
    use and not torch's is this process's where it is alone, and else more than that. So it is what is measured, but no
    less than CONTEXT_BYTES, to which code that is loaded later may bring it, and no more than LARGEST_CONTEXT_BYTES,
    above which it is others'. Beside others it errs to the side of taking less.
    """
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    return min(max(outside, CONTEXT_BYTES), LARGEST_CONTEXT_BYTES)


def require_possible(limit: int, name: str, total: int, context: int) -> None:
    """Raises ConfigError for a limit that a GPU of `total` bytes cannot have, or that its context takes wholly."""
    found = f"gpu_memory_limit: {limit / GIB:.2f} GiB"
    if limit > total:
        raise ConfigError("the limit is above what the GPU has", found=found, allowed=f"{total / GIB:.2f} GiB ({name})")
    if limit <= context:
        raise ConfigError(
            "the limit leaves nothing for tensors",
            found=found,
            allowed=f"more than the process's own {context / GIB:.2f} GiB",
        )


def device_index(device: torch.device | int | None) -> int:
    """Its number, where a function of torch wants one."""
    index = device if device is None or isinstance(device, int) else device.index
    return torch.cuda.current_device() if index is None else index
