"""How long it takes to merely read so many bytes, in launches like those of decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.early_triton import begin, wait
from fourfold.kernels.launching import launches_early

__all__ = ["reading_us"]

# Warps of a program, and loads of 16 bytes that each lane has on their way at once.
SHAPES = ((4, 4), (4, 8), (4, 16), (8, 4), (8, 8), (8, 16))


@triton.jit
def read_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_words: tl.tensor,
    WIDTH: tl.constexpr,
    LOADS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One number of each program, of LOADS times WIDTH words of 4 bytes."""
    begin(EARLY, True)
    lanes = tl.arange(0, WIDTH)
    first = tl.program_id(0) * (WIDTH * LOADS)
    total = tl.zeros([WIDTH], tl.int32)
    for load in tl.static_range(LOADS):
        at = first + load * WIDTH + lanes
        total ^= tl.load(x_ptr + at, mask=at < num_words, other=0)
    wait(EARLY, True)
    tl.store(out_ptr + tl.program_id(0), tl.xor_sum(total))


def read(source: Tensor, warps: int, loads: int) -> Tensor:
    """Of int32 [words] something that no part of it may be left out of."""
    width = warps * 32 * 4
    programs = triton.cdiv(source.numel(), width * loads)
    out = torch.empty(programs, dtype=torch.int32, device=source.device)
    early = launches_early(source.device)
    read_kernel[(programs,)](
        *(out, source, source.numel()), WIDTH=width, LOADS=loads, EARLY=early, num_warps=warps, launch_pdl=early
    )
    return out


def reading_us(num_bytes: int, rotated_bytes: int, graph_us: Callable[[list[Callable[[], Any]]], float]) -> float:
    """Microseconds of the fastest of SHAPES; each call reads other bytes, of `rotated_bytes` altogether."""
    # A multiple that lets four words be loaded at once.
    words = num_bytes // 256 * 64
    sources = [
        torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, device="cuda")
        for _ in range(1 + rotated_bytes // num_bytes)
    ]
    return min(graph_us([partial(read, source, warps, loads) for source in sources]) for warps, loads in SHAPES)
