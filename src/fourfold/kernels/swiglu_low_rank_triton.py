# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of swiglu.py that multiply by the adapters' matrices what they hold on the chip.

The forward kernel's programs own rows and pass over all columns, for the product is a sum over columns; the backward
kernel's own columns and pass over a share of the rows, for its products are sums over tokens. The shares are added up
in an order of their own, so that the result is the same in each run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device

__all__ = ["BACKWARD_PASS", "FORWARD_PASS", "Pass", "swiglu_backward_sums", "swiglu_product"]


class Pass(NamedTuple):
    """A program's tile of rows and columns, its warps, the tiles it has under way, and a thread's registers at most."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


FORWARD_PASS = Pass(32, 128, 4, 3)
BACKWARD_PASS = Pass(32, 128, 8, 3)


@triton.jit
def _sigmoid(x):
    # 1 / y by the square of 1 / sqrt(y): a division takes eight instructions, for divisors beyond 2**126 alone.
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def _activation(gate, GELU: tl.constexpr):
    """The activation and its derivative, fp32."""
    if GELU:
        tanh = 2 * _sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        value = 0.5 * gate * (1 + tanh)
        derivative = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * slope
    else:
        sigmoid = _sigmoid(gate)
        value = gate * sigmoid
        derivative = sigmoid + value * (1 - sigmoid)
    return value, derivative


@triton.jit
def _either(a, b):
    return a


@triton.jit
def _settled(tile):
    """The tile itself.

    A reduction over an axis of one element, which moves nothing, is what the compiler computes nothing anew across. It
    would else compute the tile twice: as it is stored, and again as the tensor cores take it.
    """
    return tl.reduce(tl.reshape(tile, [tile.shape[0], tile.shape[1], 1]), 2, _either)


@triton.jit
def swiglu_product_kernel(
    gate_up_ptr,  # [M, 2I]
    projection_ptr,  # [R, I]
    out_ptr,  # [M, I + R]
    product_ptr,  # the R columns of out, or fp32 [splits, M, R]
    num_rows,
    in_stride,
    projection_stride,
    out_stride,
    product_stride,
    SPLIT: tl.constexpr,  # columns of a program
    I: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    row_mask = first + rows < num_rows
    in_offsets = rows[:, None] * in_stride
    out_offsets = rows[:, None] * out_stride
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    split = tl.program_id(1)
    for start in range(0, SPLIT, BLOCK_K):
        columns = split * SPLIT + start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (columns < I)[None, :]
        gate_at = gate_up_ptr + first * in_stride + (in_offsets + columns[None, :])
        gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
        up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
        projection_at = projection_ptr + ranks[:, None] * projection_stride + columns[None, :]
        projection = tl.load(projection_at, (ranks < R)[:, None] & (columns < I)[None, :], 0.0)
        value, _ = _activation(gate, GELU)
        y = _settled((value.to(dtype).to(tl.float32) * up).to(dtype))
        tl.store(out_ptr + first * out_stride + (out_offsets + columns[None, :]), y, mask)
        acc = tl.dot(y, tl.trans(projection), acc)
    product_rows = split.to(tl.int64) * num_rows + first + rows
    product_at = product_ptr + product_rows[:, None] * product_stride + ranks[None, :]
    tl.store(product_at, acc.to(product_ptr.dtype.element_ty), row_mask[:, None] & (ranks < R)[None, :])


@triton.jit
def _sum_tile(wide, low, acc, WIDE_FIRST: tl.constexpr):
    """acc + wide.T @ low, or its transpose."""
    return tl.dot(tl.trans(wide), low, acc) if WIDE_FIRST else tl.dot(tl.trans(low), wide, acc)


@triton.jit
def _low_tile(low_ptr, offsets, mask, ranks, R: tl.constexpr):
    return tl.load(low_ptr + offsets + ranks[None, :], mask & (ranks < R)[None, :], 0.0)


@triton.jit
def _store_sum(sums_ptr, acc, columns, ranks, I: tl.constexpr, R: tl.constexpr, WIDE_FIRST: tl.constexpr):  # noqa: E741
    if not WIDE_FIRST:
        acc = tl.trans(acc)
    tl.store(sums_ptr + columns[:, None] + ranks[None, :] * I, acc, (columns < I)[:, None] & (ranks < R)[None, :])


@triton.jit
def swiglu_backward_sums_kernel(
    gate_up_ptr,  # [M, 2I]
    out_ptr,  # gate_up_ptr, once more: what is stored has addresses that need no registers until then
    grad_ptr,  # [M, I]
    low_ptr,  # [M, GATE_RANK + UP_RANK]
    grad_low_ptr,  # [M, DOWN_RANK]
    sums_ptr,  # fp32 [splits, GATE_RANK + UP_RANK + DOWN_RANK, I]
    num_rows,
    split_rows,  # of a program
    gate_up_stride,
    grad_stride,
    low_stride,
    grad_low_stride,
    SPLIT: tl.constexpr,  # split_rows, or 0 for a loop whose length the compiler does not know
    I: tl.constexpr,  # noqa: E741
    GELU: tl.constexpr,
    GATE_RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    BLOCK_GATE: tl.constexpr,
    BLOCK_UP: tl.constexpr,
    BLOCK_DOWN: tl.constexpr,
    WIDE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_mask = (columns < I)[None, :]
    split = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    gate_ranks, up_ranks, down_ranks = tl.arange(0, BLOCK_GATE), tl.arange(0, BLOCK_UP), tl.arange(0, BLOCK_DOWN)
    gate_offsets = rows[:, None] * gate_up_stride + columns[None, :]
    grad_offsets = rows[:, None] * grad_stride + columns[None, :]
    low_offsets = rows[:, None] * low_stride
    grad_low_offsets = rows[:, None] * grad_low_stride
    if WIDE_FIRST:
        gate_sum = tl.zeros([BLOCK_K, BLOCK_GATE], tl.float32)
        up_sum = tl.zeros([BLOCK_K, BLOCK_UP], tl.float32)
        down_sum = tl.zeros([BLOCK_K, BLOCK_DOWN], tl.float32)
    else:
        gate_sum = tl.zeros([BLOCK_GATE, BLOCK_K], tl.float32)
        up_sum = tl.zeros([BLOCK_UP, BLOCK_K], tl.float32)
        down_sum = tl.zeros([BLOCK_DOWN, BLOCK_K], tl.float32)
    first = split * split_rows
    for start in range(0, SPLIT if SPLIT > 0 else tl.minimum(split_rows, num_rows - first), BLOCK_M):
        row = tl.minimum(first + start, num_rows).to(tl.int64)
        row_mask = (row + rows < num_rows)[:, None]
        mask = row_mask & column_mask
        gate_at = gate_up_ptr + row * gate_up_stride + gate_offsets
        grad = tl.load(grad_ptr + row * grad_stride + grad_offsets, mask, 0.0).to(tl.float32)
        gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
        up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
        low_at = low_ptr + row * low_stride
        value, derivative = _activation(gate, GELU)
        value = value.to(dtype).to(tl.float32)
        dgate = _settled((grad * up * derivative).to(dtype))
        dup = _settled((grad * value).to(dtype))
        out_at = out_ptr + row * gate_up_stride + gate_offsets
        tl.store(out_at, dgate, mask)
        tl.store(out_at + I, dup, mask)
        if GATE_RANK > 0:
            low = _low_tile(low_at, low_offsets, row_mask, gate_ranks, GATE_RANK)
            gate_sum = _sum_tile(dgate, low, gate_sum, WIDE_FIRST)
        if UP_RANK > 0:
            low = _low_tile(low_at + GATE_RANK, low_offsets, row_mask, up_ranks, UP_RANK)
            up_sum = _sum_tile(dup, low, up_sum, WIDE_FIRST)
        if DOWN_RANK > 0:
            low = _low_tile(grad_low_ptr + row * grad_low_stride, grad_low_offsets, row_mask, down_ranks, DOWN_RANK)
            down_sum = _sum_tile(_settled((value * up).to(dtype)), low, down_sum, WIDE_FIRST)
    sums_at = sums_ptr + split.to(tl.int64) * (GATE_RANK + UP_RANK + DOWN_RANK) * I
    if GATE_RANK > 0:
        _store_sum(sums_at, gate_sum, columns, gate_ranks, I, GATE_RANK, WIDE_FIRST)
    if UP_RANK > 0:
        _store_sum(sums_at + GATE_RANK * I, up_sum, columns, up_ranks, I, UP_RANK, WIDE_FIRST)
    if DOWN_RANK > 0:
        _store_sum(sums_at + (GATE_RANK + UP_RANK) * I, down_sum, columns, down_ranks, I, DOWN_RANK, WIDE_FIRST)


def rank_block(rank: int) -> int:
    """The columns of a tile for `rank`: a tile of the tensor cores is full."""
    return max(16, next_power_of_2(rank))


def swiglu_product(
    gate_up: Tensor, projection: Tensor, activation: str = "silu", tile: Pass = FORWARD_PASS, splits: int = 1
) -> Tensor:
    """`swiglu.swiglu` with a projection, in one pass."""
    num_rows, width, rank = gate_up.shape[0], gate_up.shape[1] // 2, projection.shape[0]
    out = torch.empty(num_rows, width + rank, dtype=gate_up.dtype, device=gate_up.device)
    split = cdiv(cdiv(width, splits), tile.block_k) * tile.block_k
    splits = cdiv(width, split)
    product = out[:, width:]
    if splits > 1:
        product = torch.empty(splits, num_rows, rank, dtype=torch.float32, device=gate_up.device)
    with on_device(gate_up):
        swiglu_product_kernel[(cdiv(num_rows, tile.block_m), splits)](
            gate_up,
            projection,
            out,
            product,
            num_rows,
            gate_up.stride(0),
            projection.stride(0),
            out.stride(0),
            product.stride(-2),
            SPLIT=split,
            I=width,
            R=rank,
            GELU=activation == "gelu_tanh",
            BLOCK_R=rank_block(rank),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
    if splits > 1:
        out[:, width:] = product.sum(0)
    return out


def swiglu_backward_sums(
    gate_up: Tensor,
    grad: Tensor,
    low: Tensor,
    ranks: tuple[int, int],
    grad_low: Tensor,
    activation: str = "silu",
    tile: Pass = BACKWARD_PASS,
    splits: int = 7,
    wide_first: bool = True,
    static: bool = True,
) -> Tensor:
    """Gradients of gate and up over the inputs; their sums with `low`, and y's with `grad_low`: fp32 [ranks, I]."""
    num_rows, width = grad.shape
    gate_rank, up_rank = ranks
    down_rank = grad_low.shape[1]
    split = cdiv(cdiv(num_rows, splits), tile.block_m) * tile.block_m
    splits = cdiv(num_rows, split)
    total = gate_rank + up_rank + down_rank
    sums = torch.empty(splits, total, width, dtype=torch.float32, device=grad.device)
    with on_device(grad):
        swiglu_backward_sums_kernel[(cdiv(width, tile.block_k), splits)](
            gate_up,
            gate_up,
            grad,
            low,
            grad_low,
            sums,
            num_rows,
            split,
            gate_up.stride(0),
            grad.stride(0),
            low.stride(0),
            grad_low.stride(0),
            SPLIT=split if static else 0,
            I=width,
            GELU=activation == "gelu_tanh",
            GATE_RANK=gate_rank,
            UP_RANK=up_rank,
            DOWN_RANK=down_rank,
            BLOCK_GATE=rank_block(gate_rank),
            BLOCK_UP=rank_block(up_rank),
            BLOCK_DOWN=rank_block(down_rank),
            WIDE_FIRST=wide_first,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
    return sums.sum(0)
