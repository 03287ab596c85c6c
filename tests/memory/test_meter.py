from __future__ import annotations

import mmap

import pytest
import torch

from fourfold.memory.meter import memory_used, reset_peak


def test_cpu_reading_follows_an_allocation() -> None:
    before = memory_used("cpu")
    # Pages of its own: what was freed before may be given to a tensor, and nothing more is in use then.
    with mmap.mmap(-1, 64 * 2**20) as block:
        for _ in range(64):
            block.write(bytes([1]) * 2**20)
        held = memory_used("cpu")
    assert held.current_bytes - before.current_bytes > 48 * 2**20
    assert held.peak_bytes >= held.current_bytes


def test_cpu_peak_can_be_measured_anew() -> None:
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    high = memory_used("cpu").peak_bytes
    del block
    if not reset_peak("cpu"):
        pytest.skip("this system does not let a process reset its peak")
    assert memory_used("cpu").peak_bytes < high - 32 * 2**20


@pytest.mark.gpu
def test_cuda_reading_is_that_of_the_allocator() -> None:
    torch.cuda.empty_cache()
    reset_peak("cuda")
    before = memory_used("cuda").current_bytes
    block = torch.ones(2**20, dtype=torch.uint8, device="cuda")
    assert memory_used("cuda").current_bytes - before == 2**20
    del block
    reading = memory_used("cuda")
    assert reading.current_bytes == before
    assert reading.peak_bytes == before + 2**20
    assert reading.reserved_bytes >= reading.peak_bytes
