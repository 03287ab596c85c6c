"""Page-locked host memory, from which a GPU copies by itself."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from pathlib import Path
from typing import Any

import torch

from fourfold.errors import TrainingError

__all__ = ["HostBuffer", "available_bytes", "rounded_to_pages", "spare_bytes"]

# What a plan leaves alone of the host's memory: the process itself, loaders of data and caches live there, too, and where
# it is used up the system kills the process without a word. At least so much, or this share of what is available.
_LEFT_BYTES, _LEFT_SHARE = 4 * 2**30, 1 / 8


def rounded_to_pages(num_bytes: int) -> int:
    """What a HostBuffer of `num_bytes` takes."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def available_bytes() -> int | None:
    """Host memory that can still be had without swapping, by the kernel and by the control group; None if unknown."""
    figures = []
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            figures.append(int(lines["MemAvailable"].split()[0]) * 1024)
    group = Path("/sys/fs/cgroup")
    limit = group / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        used = int((group / "memory.current").read_text())
        # The group's page cache counts as used, and is let go when something else is wanted.
        lines = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        figures.append(int(most) - used + int(lines.get("inactive_file", 0)) + int(lines.get("active_file", 0)))
    return min(figures, default=None)


def spare_bytes() -> int | None:
    """What a run may plan to lock of `available_bytes`; None if unknown."""
    available = available_bytes()
    return None if available is None else max(0, available - max(_LEFT_BYTES, int(available * _LEFT_SHARE)))


class HostBuffer:
    """uint8 [num_bytes] in host memory, page-locked for CUDA as long as this object lives.

    PyTorch's own allocator of such memory gives the next power of two, up to twice what is asked for; this takes whole
    pages.

    Args:
        num_bytes: Size.
        pinned: Whether it is page-locked, through the current CUDA device and for all of them.
        purpose: What errors say it is for.
        otherwise: What they say can be done.

    Raises:
        TrainingError: The system has no such memory left, or refuses to lock it.
    """

    def __init__(self, num_bytes: int, *, pinned: bool, purpose: str, otherwise: str = "use less of it") -> None:
        if not pinned:
            self.data = torch.empty(num_bytes, dtype=torch.uint8)
            return
        # Anonymous pages of its own: what is locked shares no page with anything else. A process that is forked, such
        # as a loader of data, does not get them: a write here would otherwise part them from those that CUDA knows.
        pages = mmap.mmap(-1, max(1, rounded_to_pages(num_bytes)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_DONTFORK)
        # Touched by all cores at once: pages that are not there yet are locked by one.
        whole = torch.frombuffer(pages, dtype=torch.uint8).zero_()
        runtime: Any = torch.cuda.cudart()
        status = runtime.cudaHostRegister(whole.data_ptr(), len(pages), 0)
        if status != runtime.cudaError.success:
            _forget_last_error()
            raise TrainingError(
                f"page-locked host memory was refused: {num_bytes / 2**20:,.0f} MiB for {purpose}",
                found=f"CUDA error {int(status)}",
                hint="raise the limit on locked memory (`ulimit -l unlimited`, `docker run --ulimit memlock=-1`), or "
                f"{otherwise}",
            )
        # Holds the pages: they are unlocked first, and given back then.
        weakref.finalize(self, _unlock, pages, whole.data_ptr(), torch.cuda.current_device()).atexit = False
        self.data = whole[:num_bytes]


def _unlock(pages: mmap.mmap, address: int, device: int) -> None:
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        runtime: Any = torch.cuda.cudart()
        runtime.cudaHostUnregister(address)


def _forget_last_error() -> None:
    """CUDA keeps the last error for the next launch to report, which has nothing to do with it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda").add_(1)
