"""The product of `small_batch` in Triton.

W's tile is the left operand of the tensor cores, decoded in the registers in which they want it, and x^T the right one.
A byte of codes holds an even and an odd column; instead of weaving the two together,

    x W^T = x_even W_high^T + x_odd W_low^T

with x read as 32-bit pairs and parted in registers. Where the rows of W give too few programs to fill the GPU, programs
share the columns too, and a second launch adds their fp32 sums, always in the same order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.availability import launching_on
from fourfold.kernels.blockwise_triton import block_scales, code_points

__all__ = ["configuration", "matmul"]

BLOCK_N = 64
# Programs that keep all SMs of a large GPU busy, by the rows of the tile of x. Fixed rather than asked of the GPU: the
# order of the sums, and so the result, is the same on every one.
PROGRAMS = {16: 528, 32: 396, 64: 264}


@triton.jit
def matmul_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    LOOKUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """IS_SPLIT: `out` is fp32 [splits, num_rows, BLOCK_M]; otherwise the result [num_inputs, num_rows]."""
    PAIRS: tl.constexpr = BLOCK_K // 2
    dtype = x_ptr.dtype.element_ty
    split = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    has_row = row < num_rows
    m = tl.arange(0, BLOCK_M)
    pair = tl.arange(0, PAIRS)
    byte_ptrs = codes_ptr + row[:, None] * (num_columns // 2) + pair[None, :]
    pair_ptrs = x_ptr.to(tl.pointer_type(tl.int32)) + m[None, :] * (num_columns // 2) + pair[:, None]
    total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        column = (split * STEPS + step) * BLOCK_K
        # The last of the programs that share a row may have fewer steps than the others.
        has_tile = has_row & (column < num_columns)
        byte = tl.load(byte_ptrs + column // 2, mask=has_tile[:, None], other=0)
        has_pair = (m[None, :] < num_inputs) & (column < num_columns)
        x_pair = tl.load(pair_ptrs + column // 2, mask=has_pair, other=0)
        # A row's BLOCK_K columns lie in one block, or in two: the halves of 128 columns in blocks of 64.
        block = (row * num_columns + column) >> BLOCK_SHIFT
        scale = block_scales(
            *(block, has_tile, scales_ptr, code_map_ptr, nested_absmax_ptr, offset_ptr), NESTED_SHIFT=NESTED_SHIFT
        )[:, None]
        if BLOCK_K > 2**BLOCK_SHIFT:
            second = block_scales(
                *(block + 1, has_tile, scales_ptr, code_map_ptr, nested_absmax_ptr, offset_ptr),
                NESTED_SHIFT=NESTED_SHIFT,
            )[:, None]
            scale = tl.where(pair[None, :] < PAIRS // 2, scale, second)
        code = byte.to(tl.int32)
        high = (code_points(code >> 4, codebook_ptr, BITS=4, LOOKUP=LOOKUP) * scale).to(dtype)
        low = (code_points(code, codebook_ptr, BITS=4, LOOKUP=LOOKUP) * scale).to(dtype)
        # The even column is the lower half of a little-endian pair, and the high nibble of a byte.
        even = (x_pair & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
        odd = (x_pair >> 16).to(tl.int16).to(dtype, bitcast=True)
        total = tl.dot(high, even, total)
        total = tl.dot(low, odd, total)
    if IS_SPLIT:
        place = (split * num_rows + row)[:, None] * BLOCK_M + m[None, :]
        tl.store(out_ptr + place, total, mask=has_row[:, None])
    else:
        if bias_ptr is not None:
            total += tl.load(bias_ptr + row, mask=has_row, other=0.0).to(tl.float32)[:, None]
        place = m[None, :] * num_rows + row[:, None]
        tl.store(out_ptr + place, total.to(dtype), mask=has_row[:, None] & (m[None, :] < num_inputs))


@triton.jit
def sum_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_rows: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """The sum over the first axis of fp32 [SPLITS, num_rows, BLOCK_M], with the bias, as [num_inputs, num_rows]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    mask = (row < num_rows)[:, None] & (m[None, :] < num_inputs)
    total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for split in tl.static_range(SPLITS):
        place = (split * num_rows + row)[:, None] * BLOCK_M + m[None, :]
        total += tl.load(partial_ptr + place, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :] * num_rows + row[:, None], total.to(out_ptr.dtype.element_ty), mask=mask)


def configuration(num_inputs: int, num_rows: int, num_columns: int) -> tuple[int, int, int, int]:
    """Rows of x in a tile, columns in a tile, tiles for each of the programs that share a row, and their number."""
    block_m = 16 if num_inputs <= 16 else 32 if num_inputs <= 32 else 64
    block_k = 128 if num_columns % 128 == 0 else 64
    steps = num_columns // block_k
    # At least four steps each, or the loads of the first are all that a program waits for.
    splits = max(1, min(round(PROGRAMS[block_m] / triton.cdiv(num_rows, BLOCK_N)), steps // 4, 16))
    steps_each = triton.cdiv(steps, splits)
    return block_m, block_k, steps_each, triton.cdiv(steps, steps_each)


def matmul(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor,
    code_map: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    nested_block_size: int,
    num_rows: int,
    bias: Tensor | None = None,
    lookup: str | None = None,
) -> Tensor:
    """`fourfold.kernels.small_batch.matmul_4bit` for what `serves` says.

    Args:
        lookup: One of `blockwise_triton.LOOKUPS` instead of the usual one, to compare them.
    """
    num_columns = x.shape[-1]
    out = torch.empty([*x.shape[:-1], num_rows], dtype=x.dtype, device=x.device)
    x = x.reshape(-1, num_columns).contiguous()
    if x.data_ptr() % 4:
        x = x.clone()
    num_inputs = x.shape[0]
    block_m, block_k, steps, splits = configuration(num_inputs, num_rows, num_columns)
    partial = out
    if splits > 1:
        partial = torch.empty([splits, num_rows, block_m], dtype=torch.float32, device=x.device)
    # The interpreter has no warps.
    lookup = lookup or ("shuffle" if x.is_cuda else "gather")
    with launching_on(x):
        matmul_kernel[(triton.cdiv(num_rows, BLOCK_N), splits)](
            *(partial, x, codes, codebook, scales, code_map, nested_absmax, offset, bias),
            *(num_inputs, num_rows, num_columns),
            BLOCK_SHIFT=block_size.bit_length() - 1,
            NESTED_SHIFT=nested_block_size.bit_length() - 1,
            LOOKUP=lookup,
            BLOCK_M=block_m,
            BLOCK_N=BLOCK_N,
            BLOCK_K=block_k,
            IS_SPLIT=splits > 1,
            STEPS=steps,
            STAGES=4 if block_m < 64 else 3,
            num_warps=4,
            enable_fp_fusion=False,
        )
        if splits > 1:
            sum_kernel[(triton.cdiv(num_rows, 32),)](
                *(out, partial, bias, num_inputs, num_rows),
                BLOCK_M=block_m,
                BLOCK_N=32,
                SPLITS=splits,
                num_warps=4,
            )
    return out
