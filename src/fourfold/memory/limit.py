"""A limit on what this process takes of a GPU, kept by torch's allocator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fourfold.memory.gpus import context_bytes, device_index, require_possible

__all__ = ["memory_limit"]


@contextlib.contextmanager
def memory_limit(device: torch.device, num_bytes: int | None) -> Iterator[None]:
    """Within, the process takes at most so much of a GPU, as if the card were that large.

    torch's allocator gets what the process takes outside of it (`context_bytes`) less, and refuses what is beyond:
    torch.OutOfMemoryError. What it holds already counts; its cache is given back where it would be beyond. Afterwards
    it may take what it could before. Off GPUs there is nothing to keep.

    Args:
        device: The GPU.
        num_bytes: All that the process may take; None: what it can get.

    Raises:
        ConfigError: More than the GPU has, or nothing left for tensors.
    """
    if num_bytes is None or device.type != "cuda":
        yield
        return
    index = device_index(device)
    total = torch.cuda.get_device_properties(index).total_memory
    context = context_bytes(device)
    require_possible(num_bytes, torch.cuda.get_device_name(index), total, context)
    before = torch.cuda.get_per_process_memory_fraction(index)
    torch.cuda.set_per_process_memory_fraction(min(before, (num_bytes - context) / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)
