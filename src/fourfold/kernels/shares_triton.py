# mypy: allow-untyped-defs, allow-incomplete-defs
"""What kernels share that sum over tokens: how they go over a matrix, and the sums of what their programs leave.

A program sums a share of the rows, and stores its part in fp32. The parts are added up in an order of their own, so
that the result is the same in each run.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv

__all__ = ["SUM_BLOCK", "Pass", "add_up", "sum_shares", "sum_tile"]


class Pass(NamedTuple):
    """How a kernel goes over its matrices.

    Attributes:
        block_m, block_k: Rows and columns of a program's tile.
        num_warps: Of a program.
        num_stages: The tile that is worked on, and those being loaded meanwhile.
        programs: As many as are under way at once on 132 multiprocessors. Fixed rather than asked of the GPU, so that
            the order of the sums, and the result, is always the same.
        max_registers: Of a thread; None for what the compiler takes.
        wide_first: Whether sums are [columns, ranks], as suits the tensor cores of Hopper, whose products have at least
            64 rows, or [ranks, columns], as suits those before, whose products have 16.
    """

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int
    max_registers: int | None = None
    wide_first: bool = False


SUM_BLOCK = 512


@triton.jit
def sum_tile(wide, low, acc, WIDE_FIRST: tl.constexpr):
    """acc + wide.T @ low, or its transpose."""
    return tl.dot(tl.trans(wide), low, acc) if WIDE_FIRST else tl.dot(tl.trans(low), wide, acc)


@triton.jit
def add_up(parts_ptr, index, mask, size, COUNT: tl.constexpr):
    """Elements `index` of the sum of fp32 [COUNT, size] over its first axis."""
    parts_at = parts_ptr + index
    total = tl.load(parts_at, mask, 0.0)
    for _ in tl.static_range(1, COUNT):
        parts_at += size
        total += tl.load(parts_at, mask, 0.0)
    return total


@triton.jit
def sum_shares_kernel(
    out_ptr,  # [size / COLUMNS, COLUMNS]
    shares_ptr,  # fp32 [SHARES, size]
    factors_ptr,  # [COLUMNS] that the sums are multiplied by, or None
    before_ptr,  # fp32 [size / COLUMNS, COLUMNS] that they are added to, contiguous, or None
    size,
    out_stride,
    COLUMNS: tl.constexpr,
    SHARES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = add_up(shares_ptr, index, mask, size, SHARES)
    if factors_ptr is not None:
        total *= tl.load(factors_ptr + index % COLUMNS, mask, 0.0).to(tl.float32)
    if before_ptr is not None:
        total += tl.load(before_ptr + index, mask, 0.0)
    out_at = out_ptr + (index // COLUMNS).to(tl.int64) * out_stride + index % COLUMNS
    tl.store(out_at, total.to(out_ptr.dtype.element_ty), mask)


def sum_shares(out: Tensor, shares: Tensor, factors: Tensor | None = None, before: Tensor | None = None) -> None:
    """out <- (sum of fp32 [shares, rows, columns] over its first axis) * factors + before; on the current device."""
    count, rows, columns = shares.shape
    size = rows * columns
    sum_shares_kernel[(cdiv(size, SUM_BLOCK),)](
        out,
        shares,
        factors,
        before,
        size,
        out.stride(0),
        COLUMNS=columns,
        SHARES=count,
        BLOCK=SUM_BLOCK,
        num_warps=4,
    )
