"""What memory a process uses now and has used at most, on the GPU or on the CPU."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["MemoryReading", "memory_used", "reset_peak"]

# Linux alone reports the present resident set and lets a process lower its own high-water mark.
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK_RSS = "5"  # see proc(5), /proc/pid/clear_refs


@dataclass(frozen=True)
class MemoryReading:
    """Memory in use on one device.

    Attributes:
        current_bytes: In use now. CUDA: held by tensors. CPU: the process's resident set.
        peak_bytes: The most in use since the process began or since `reset_peak`.
        reserved_bytes: CUDA: the most that PyTorch's allocator has held from the driver, which is what
            other programs see as taken. CPU: equal to `peak_bytes`.
    """

    current_bytes: int
    peak_bytes: int
    reserved_bytes: int


def memory_used(device: torch.device | str) -> MemoryReading:
    """Read the memory in use on `device`; every device but CUDA is read as the process's resident set."""
    device = torch.device(device)
    if device.type == "cuda":
        return MemoryReading(
            current_bytes=torch.cuda.memory_allocated(device),
            peak_bytes=torch.cuda.max_memory_allocated(device),
            reserved_bytes=torch.cuda.max_memory_reserved(device),
        )
    if _STATUS.exists():
        fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
        current = int(fields["VmRSS"].split()[0]) * 1024
        peak = int(fields["VmHWM"].split()[0]) * 1024
    else:
        # macOS counts in bytes, the other Unixes in KiB; neither tells the present resident set here.
        unit = 1 if sys.platform == "darwin" else 1024
        current = peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryReading(current_bytes=current, peak_bytes=peak, reserved_bytes=peak)


def reset_peak(device: torch.device | str) -> bool:
    """Start measuring the peak anew.

    Returns:
        Whether the peak was reset. On the CPU that is possible on Linux only, and not in every container.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK_RSS)
    except OSError:
        return False
    return True
