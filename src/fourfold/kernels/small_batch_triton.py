"""The product of `small_batch` in Triton.

Decoding takes the time, so a weight is decoded in the very register in which the tensor cores want it: nothing of W
passes through shared memory. In a product of the tensor cores, out^T += W x^T over 16 columns, lane 4 r + q of a warp
holds of rows r and r + 8 of W, and of row r of x, the columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. The order of the
columns in a sum is free, so those four are made to be neighbours in memory: the lane reads whole words of codes, eight
columns each, and the sixteen bytes of x that belong to such a word.

Tiles are spelled [4 (q), 8 (r), WARPS, rows / 8, ...] because Triton deals elements to the lanes, then to the warps, in
the order of the dimensions: what is loaded then is the operand already, and no layout is converted. Shapes are changed
by `reshape` and not by `[..., None]` because only that lets Triton carry a load's layout on.

The warps of a program share out the columns and meet only at the end. Where the rows of W still give too few warps to
fill the GPU, programs share the columns too, and a second launch adds their fp32 sums, always in the same order.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.blockwise_triton import code_points
from fourfold.kernels.launching import on_device

__all__ = ["TILES", "Configuration", "Tile", "configuration", "matmul", "sum_splits"]


@triton.jit
def operand(tile: tl.tensor, ROWS: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """[4, 8, WARPS, ROWS / 8, 8] as [WARPS, ROWS, 32], each lane's columns where the tensor cores look for them."""
    parted = tile.reshape(4, 8, WARPS, ROWS // 8, 2, 2, 2)
    return parted.permute(2, 3, 1, 4, 5, 0, 6).reshape(WARPS, ROWS, 32)


# One kernel for all numbers of rows that share a tile.
@triton.jit(do_not_specialize=["num_inputs"])
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
    ROW_WARPS: tl.constexpr,
    COLUMN_WARPS: tl.constexpr,
    WORDS: tl.constexpr,
    STEPS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
) -> None:
    """One warp: BLOCK_N rows of W and STEPS times 32 WORDS columns.

    IS_EVEN: The columns fill all steps of all warps.
    IS_SPLIT: `out` is fp32 [splits, num_rows, BLOCK_M]; otherwise the result [num_inputs, num_rows].
    """
    COLUMNS: tl.constexpr = 32 * WORDS
    WARPS: tl.constexpr = ROW_WARPS * COLUMN_WARPS
    ROWS: tl.constexpr = ROW_WARPS * BLOCK_N
    dtype = x_ptr.dtype.element_ty
    r = tl.arange(0, 8)[None, :, None, None]
    warp = tl.arange(0, WARPS)[None, None, :, None]
    column_warp = tl.program_id(1) * COLUMN_WARPS + warp // ROW_WARPS
    start = column_warp * (STEPS * COLUMNS) + tl.arange(0, 4)[:, None, None, None] * (8 * WORDS)
    # Rows that are not there are read as the last one, which is cheaper than a mask: their sums are never stored.
    row_warp = tl.program_id(0) * ROW_WARPS + warp % ROW_WARPS
    n = row_warp * BLOCK_N + tl.arange(0, BLOCK_N // 8)[None, None, None, :] * 8 + r
    m = tl.arange(0, BLOCK_M // 8)[None, None, None, :] * 8 + r
    element = tl.minimum(n, num_rows - 1) * num_columns + start
    x_element = tl.minimum(m, num_inputs - 1) * num_columns + start
    # Rounded to what they are multiples of anyway, so that Triton knows it and loads sixteen bytes at once.
    word = (element // (8 * WORDS) * WORDS)[:, :, :, :, None] + tl.arange(0, WORDS)
    x_ptrs = x_ptr + ((x_element // 8 * 8)[:, :, :, :, None] + tl.arange(0, 8))
    word_ptrs = codes_ptr.to(tl.pointer_type(tl.int32)) + word
    shift = (tl.arange(0, 8) ^ 1) * 4
    total = tl.full([WARPS, BLOCK_N, BLOCK_M], 0.0, tl.float32)
    # What a step decodes is loaded in the step before.
    inside = (start < num_columns) | IS_EVEN
    words = tl.load(word_ptrs, mask=inside[:, :, :, :, None], other=0)
    scale = tl.load(scales_ptr + (element >> BLOCK_SHIFT), mask=inside, other=0)
    for step in range(STEPS):
        # [4, 8, WARPS, BLOCK_N / 8]
        absmax = scale
        if code_map_ptr is not None:
            nested_block = (element + step * COLUMNS) >> (BLOCK_SHIFT + NESTED_SHIFT)
            nested_absmax = tl.load(nested_absmax_ptr + nested_block, mask=inside, other=0.0)
            # Two roundings: fused multiply-adds must be off.
            absmax = tl.load(code_map_ptr + scale.to(tl.int32)) * nested_absmax + tl.load(offset_ptr)
        absmax = absmax.reshape(4, 8, WARPS, BLOCK_N // 8, 1)
        if WORDS == 4:
            even, odd = tl.split(words.reshape(4, 8, WARPS, BLOCK_N // 8, 2, 2))
            word0, word2 = tl.split(even)
            word1, word3 = tl.split(odd)
        else:
            word0, word1 = tl.split(words)
            word2, word3 = word0, word1
        x_inside = inside
        column = tl.minimum(step + 1, STEPS - 1) * COLUMNS
        inside = (start + column < num_columns) | IS_EVEN
        words = tl.load(word_ptrs + column // 8, mask=inside[:, :, :, :, None], other=0)
        scale = tl.load(scales_ptr + ((element + column) >> BLOCK_SHIFT), mask=inside, other=0)
        for i in tl.static_range(WORDS):
            held = word0 if i == 0 else word1 if i == 1 else word2 if i == 2 else word3
            code = held.reshape(4, 8, WARPS, BLOCK_N // 8, 1) >> shift
            weight = (code_points(code, codebook_ptr, BITS=4, LOOKUP=LOOKUP) * absmax).to(dtype)
            x = tl.load(x_ptrs + (step * COLUMNS + 8 * i), mask=x_inside[:, :, :, :, None], other=0.0)
            right = operand(x, BLOCK_M, WARPS).permute(0, 2, 1)
            total = tl.dot(operand(weight, BLOCK_N, WARPS), right, total)
    result = tl.sum(total.reshape(COLUMN_WARPS, ROWS, BLOCK_M), axis=0)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_row = tl.arange(0, BLOCK_M)
    has_row = (row < num_rows)[:, None]
    if IS_SPLIT:
        place = (tl.program_id(1) * num_rows + row)[:, None] * BLOCK_M + x_row[None, :]
        tl.store(out_ptr + place, result, mask=has_row)
    else:
        if bias_ptr is not None:
            result += tl.load(bias_ptr + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
        place = x_row[None, :] * num_rows + row[:, None]
        tl.store(out_ptr + place, result.to(dtype), mask=has_row & (x_row[None, :] < num_inputs))


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
    EARLY: tl.constexpr,
) -> None:
    """The sum over the first axis of fp32 [SPLITS, num_rows, BLOCK_M], with the bias, as [num_inputs, num_rows].

    EARLY: Launched before what it sums is there, and waits for it.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    mask = (row < num_rows)[:, None] & (m[None, :] < num_inputs)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for split in tl.static_range(SPLITS):
        place = (split * num_rows + row)[:, None] * BLOCK_M + m[None, :]
        total += tl.load(partial_ptr + place, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :] * num_rows + row[:, None], total.to(out_ptr.dtype.element_ty), mask=mask)


class Tile(NamedTuple):
    """How a product of up to `block_m` rows of x is shared out.

    A warp takes `block_n` rows of W, of each of them `words` words of codes a lane at once. `row_warps` warps of a
    program read the same columns of x, through their L1 cache. `warps` at most share a program, and `warps_wanted` fill
    a large GPU: fixed rather than asked of the GPU, so that the order of the sums, and the result, is always the same.
    """

    block_m: int
    block_n: int
    words: int
    row_warps: int
    warps: int
    warps_wanted: int


# More rows of W that meet the same x spare the L2 cache, which x is read from; fewer leave registers to more warps.
TILES = (
    Tile(block_m=8, block_n=16, words=4, row_warps=1, warps=8, warps_wanted=2112),
    Tile(block_m=16, block_n=32, words=4, row_warps=1, warps=8, warps_wanted=2112),
    Tile(block_m=32, block_n=32, words=2, row_warps=2, warps=8, warps_wanted=2112),
    Tile(block_m=64, block_n=32, words=2, row_warps=4, warps=4, warps_wanted=1056),
)


class Configuration(NamedTuple):
    """A tile, and what shares a row's columns: warps of a program, programs; and the steps of each warp."""

    tile: Tile
    column_warps: int
    splits: int
    steps: int


@functools.cache
def configuration(num_inputs: int, num_rows: int, num_columns: int) -> Configuration:
    """How a product is shared out: fixed by its shape."""
    tile = next(tile for tile in TILES if num_inputs <= tile.block_m)
    total = triton.cdiv(num_columns, 32 * tile.words)
    warps = triton.cdiv(num_rows, tile.block_n)
    # A warp of fewer than 512 columns spends its time on beginning and ending.
    shares = max(1, min(tile.warps_wanted // warps, num_columns // 512))
    column_warps = tile.warps // tile.row_warps
    # Four warps that come and go fill the GPU more evenly than eight, if they need no second launch.
    if column_warps >= 2 * shares and column_warps >= 8:
        column_warps //= 2
    splits = triton.cdiv(shares, column_warps)
    steps = triton.cdiv(total, column_warps * splits)
    return Configuration(tile, column_warps, triton.cdiv(total, column_warps * steps), steps)


def sum_splits(
    out: Tensor, partial: Tensor, bias: Tensor | None, num_inputs: int, block_n: int = 32, early: bool = False
) -> None:
    """Writes the sum of what programs made that share the columns.

    Args:
        out: [num_inputs, num_rows].
        partial: fp32 [splits, num_rows, block_m].
        bias: [num_rows] or None.
        num_inputs: Rows of `out`, at most block_m.
        block_n: Columns of `out` that a program sums, a power of two.
        early: Launch it before the launch before it has ended, which must let it (programmatic dependent launch).
    """
    splits, num_rows, block_m = partial.shape
    sum_kernel[(triton.cdiv(num_rows, block_n),)](
        *(out, partial, bias, num_inputs, num_rows),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLITS=splits,
        EARLY=early,
        num_warps=4,
        launch_pdl=early,
    )


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
) -> Tensor:
    """`fourfold.kernels.small_batch.matmul_4bit` for what `serves` says."""
    num_columns = x.shape[-1]
    out = torch.empty([*x.shape[:-1], num_rows], dtype=x.dtype, device=x.device)
    x = x.reshape(-1, num_columns).contiguous()
    if codes.data_ptr() % 4:
        codes = codes.clone()
    num_inputs = x.shape[0]
    tile, column_warps, splits, steps = configuration(num_inputs, num_rows, num_columns)
    partial = out
    if splits > 1:
        partial = torch.empty([splits, num_rows, tile.block_m], dtype=torch.float32, device=x.device)
    with on_device(x):
        matmul_kernel[(triton.cdiv(num_rows, tile.row_warps * tile.block_n), splits)](
            *(partial, x, codes, codebook, scales, code_map, nested_absmax, offset, bias),
            *(num_inputs, num_rows, num_columns),
            BLOCK_SHIFT=block_size.bit_length() - 1,
            NESTED_SHIFT=nested_block_size.bit_length() - 1,
            # The interpreter has no warps.
            LOOKUP="shuffle" if x.is_cuda else "gather",
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            ROW_WARPS=tile.row_warps,
            COLUMN_WARPS=column_warps,
            WORDS=tile.words,
            STEPS=steps,
            IS_EVEN=column_warps * splits * steps * 32 * tile.words == num_columns,
            IS_SPLIT=splits > 1,
            num_warps=tile.row_warps * column_warps,
            num_stages=1,
            enable_fp_fusion=False,
        )
        if splits > 1:
            sum_splits(out, partial, bias, num_inputs)
    return out
