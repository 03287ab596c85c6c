"""The host's memory, pinned: what a GPU copies to and from beside its work."""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import torch
from torch import Tensor

from fourfold.errors import TrainingError

__all__ = ["available_bytes", "host_zeros"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes that the process may still take, without swapping, of the machine and of its control group (Linux, v2).

    Where neither can be read, as on other systems, this is no limit: 2**63 - 1.
    """
    limits = [2**63 - 1]
    if _MEMINFO.is_file():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used, stat = (_CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if all(file.is_file() for file in (limit, used, stat)) and limit.read_text().strip() != "max":
        # Cached files are given up for others.
        cached = dict(line.split() for line in stat.read_text().splitlines())["inactive_file"]
        limits.append(int(limit.read_text()) - int(used.read_text()) + int(cached))
    return max(0, min(limits))


def host_zeros(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in the host's memory, flat, pinned for copies to and from `device`; ordinary ones for a CPU.

    Memory is registered with CUDA as it is, and not taken from PyTorch's pinned allocator, which rounds up to a power
    of two: up to twice of what the moments of a whole model take. It is let go with the tensor.

    Raises:
        TrainingError: There is not so much memory, or it cannot be pinned.
    """
    if device.type != "cuda":
        return torch.zeros(numel, dtype=dtype)
    num_bytes = numel * dtype.itemsize
    available = available_bytes()
    if num_bytes > available:
        # Linux gives out more than there is, and ends the process that uses it.
        raise _refused(num_bytes, f"{available:,} bytes available")
    # Whole pages of the system, so that no two of these share one.
    registered = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.zeros(registered + mmap.PAGESIZE, dtype=torch.uint8)
    start = -memory.data_ptr() % mmap.PAGESIZE
    address = memory.data_ptr() + start
    code = int(torch.cuda.cudart().cudaHostRegister(address, registered, 0))
    if code != 0:
        raise _refused(num_bytes, f"cudaHostRegister returned error {code}")
    tensor = memory[start : start + num_bytes].view(dtype)
    weakref.finalize(tensor, _release, memory, address, device).atexit = False
    return tensor


def _release(memory: Tensor, address: int, device: torch.device) -> None:
    """`memory` is here so that it is still there."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(address)


def _refused(num_bytes: int, reason: object) -> TrainingError:
    return TrainingError(
        f"The host refuses {num_bytes:,} bytes of pinned memory for the optimizer's paged state",
        found=reason,
        hint="page less by an 8-bit optimizer (optim: paged_adamw_8bit), keep state on the GPU (optim: adamw_8bit), "
        "or let the process have and lock more memory (free -h, ulimit -l)",
    )
