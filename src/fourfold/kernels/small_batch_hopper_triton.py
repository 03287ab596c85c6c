"""The product of `small_batch` in Triton for Hopper's tensor cores: more than eight rows of x, blocks of 64.

What goes for all its kernels is told in `small_batch_parts_triton`. Hopper's tensor cores (wgmma) read one operand from
shared memory by themselves, asynchronously. That is x here: all warps of a program share one copy of it, and none
spends an instruction on reading it. Of a row of W a lane reads four whole words of codes, 32 columns that are
neighbours in memory, and what it decodes of them is its part of two products over 64 columns.

x is brought into that order of the columns first: as it stands, a column's neighbours in the operand are not its
neighbours in memory, and only sixteen bytes that are can be copied into shared memory at once and asynchronously. The
copies run ahead of the products: there are three buffers, since Triton issues a copy at the end of the loop's body,
when the buffer that was read last may still be in use. Only x may go that way: what is loaded for W, a step ahead, is
carried from one pass of the loop to the next, and so Triton leaves it in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.blockwise_triton import code_points
from fourfold.kernels.launching import cdiv, is_hopper, launches_early, next_power_of_2, on_device
from fourfold.kernels.small_batch_parts_triton import from_quad, new_partial, places, store_sums, sum_splits

__all__ = ["MIN_INPUTS", "MIN_ROWS", "Shares", "matmul", "shares", "takes"]

# Fewer rows of x are multiplied faster by `small_batch_triton`, as are those of a W with fewer rows.
MIN_INPUTS = 9
MIN_ROWS = 512
# With eight, Triton would not use wgmma.
MIN_BLOCK_M = 16
WARPS = 8
# Of W, to a program.
ROWS = 16 * WARPS
# Columns whose scales a quad decodes at once: four blocks, multiplied in four products of 64 columns.
SPAN = 256
# Two on each of 132 multiprocessors: fixed rather than asked of the GPU, so that the result is always the same.
PROGRAMS = 264
STAGES = 3
# Of neighbouring elements of x, to a program of the launch that packs it.
PAIRS = 1024


# In both, one kernel for all numbers of rows that share a tile.
@triton.jit(do_not_specialize=["num_inputs"])
def hopper_pack_kernel(
    packed_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_columns: tl.tensor,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """x [num_inputs, num_columns] as [columns / 64, BLOCK_M, 64] in the operand's order, with zeros where x ends.

    k = 32 i + 16 s + 8 h + 2 q + b of product d (0 or 1) of 128 columns is column 32 q + 16 d + 8 i + 4 s + 2 h + b.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    k = pair % 32 * 2
    m = pair // 32 % BLOCK_M
    product = pair // (32 * BLOCK_M)
    column = product // 2 * 128 + k // 2 % 4 * 32 + product % 2 * 16 + k // 32 * 8 + k // 16 % 2 * 4 + k // 8 % 2 * 2
    inside = (m < num_inputs) & (column < num_columns)
    x = tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + (m * num_columns + column) // 2, mask=inside, other=0)
    tl.store(packed_ptr.to(tl.pointer_type(tl.int32)) + pair, x)


@triton.jit(do_not_specialize=["num_inputs"])
def hopper_matmul_kernel(
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
    NESTED_SHIFT: tl.constexpr,
    LOOKUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """16 WARPS rows of W and SPANS times 256 columns, those past the end multiplied with zeros.

    `x` is what `hopper_pack_kernel` makes.
    IS_SPLIT: `out` is fp32 [splits, num_rows, BLOCK_M]; otherwise the result [num_inputs, num_rows].
    """
    ROWS: tl.constexpr = 16 * WARPS
    SHIFT: tl.constexpr = 6 + NESTED_SHIFT
    # A value carried unchanged over two passes of the loop would keep Triton from running copies ahead.
    AHEAD: tl.constexpr = 1 if code_map_ptr is None else 2
    dtype = x_ptr.dtype.element_ty
    PLACES: tl.constexpr = 64 * WARPS
    q, r, warp, block = places(16, WARPS)
    n = tl.program_id(0) * ROWS + warp * 16 + block * 8 + r
    # Rows that are not there are read as the last one, which is cheaper than a mask: their sums are never stored.
    row_start = tl.minimum(n, num_rows - 1) * num_columns
    first = tl.program_id(1) * SPANS
    # The same for spans: those that are not there meet zeros in x.
    last = num_columns // 256 - 1
    # Rounded to what they are multiples of anyway, so that Triton knows it and loads sixteen bytes at once.
    word = ((row_start + q * 32) // 32 * 4)[:, None] + tl.arange(0, 4)[None, :]
    word_ptrs = codes_ptr.to(tl.pointer_type(tl.int32)) + word
    shift = (tl.arange(0, 8) ^ 1) * 4
    x_ptrs = x_ptr + (tl.arange(0, BLOCK_M)[:, None] * 64 + tl.arange(0, 64)[None, :])
    total = tl.full([ROWS, BLOCK_M], 0.0, tl.float32)
    # What a span decodes is loaded in the span before, and the codes of its scales in the one before that.
    words0 = tl.load(word_ptrs + first * 32, eviction_policy="evict_first")
    words1 = tl.load(word_ptrs + (first * 32 + 16), eviction_policy="evict_first")
    # Each lane of a quad has a block of its own.
    element = row_start + q * 64
    own = element + first * 256
    scale = tl.load(scales_ptr + (own >> 6))
    if code_map_ptr is not None:
        offset = tl.load(offset_ptr)
        point = tl.load(code_map_ptr + scale.to(tl.int32))
        nested_absmax = tl.load(nested_absmax_ptr + (own >> SHIFT))
        own = element + tl.minimum(first + 1, last) * 256
        scale = tl.load(scales_ptr + (own >> 6))
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for step in range(SPANS):
        span = first + step
        absmax = scale
        if code_map_ptr is not None:
            # Two roundings: fused multiply-adds must be off.
            absmax = point * nested_absmax + offset
            point = tl.load(code_map_ptr + scale.to(tl.int32))
            nested_absmax = tl.load(nested_absmax_ptr + (own >> SHIFT))
        own = element + tl.minimum(span + AHEAD, last) * 256
        scale = tl.load(scales_ptr + (own >> 6))
        after = tl.minimum(span + 1, last) * 32
        for half in tl.static_range(2):
            if half == 0:
                words = words0
                words0 = tl.load(word_ptrs + after, eviction_policy="evict_first")
            else:
                words = words1
                words1 = tl.load(word_ptrs + (after + 16), eviction_policy="evict_first")
            # In 128 columns, lanes 0 and 1 of a quad hold codes of the first block, lanes 2 and 3 of the second.
            factor = from_quad(absmax, 2 * half + (q >> 1), PLACES).reshape(PLACES, 1, 1)
            pair0, pair1 = tl.split(words.reshape(PLACES, 2, 2).permute(0, 2, 1))
            for i in tl.static_range(2):
                held = pair0 if i == 0 else pair1
                code = held.reshape(PLACES, 2, 1) >> shift
                weight = (code_points(code, codebook_ptr, BITS=4, LOOKUP=LOOKUP) * factor).to(dtype)
                parted = weight.reshape(2, WARPS, 8, 4, 2, 2, 2, 2)
                left = parted.permute(1, 0, 2, 4, 5, 6, 3, 7).reshape(ROWS, 64)
                x = tl.load(x_ptrs + (span * 4 + (2 * half + i)) * (BLOCK_M * 64))
                total = tl.dot(left, x.T, total)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    store_sums(out_ptr, total, bias_ptr, num_inputs, num_rows, IS_SPLIT)


class Shares(NamedTuple):
    """Programs that share the columns, and the spans of 256 columns that each of them takes."""

    splits: int
    spans: int


def shares(num_rows: int, num_columns: int) -> Shares:
    """How a product is shared out: as many programs as fit the GPU at once, and as few columns past the end as may be.

    It shares 14336 x 4096 in two, 4096 x 14336 and 4096 x 4096 in eight, 6144 x 4096 in four, as measured best.
    """
    total = cdiv(num_columns, SPAN)
    spans = cdiv(total, max(1, PROGRAMS // cdiv(num_rows, ROWS)))
    return Shares(cdiv(total, spans), spans)


def takes(x: Tensor, codes: Tensor, block_size: int, num_rows: int) -> bool:
    """Whether a product is this kernel's, of those that `fourfold.kernels.small_batch.serves` names."""
    columns = x.shape[-1]
    return (
        is_hopper(x.device)
        and x.numel() >= MIN_INPUTS * columns
        and num_rows >= MIN_ROWS
        and block_size == 64
        and columns % SPAN == 0
        and codes.data_ptr() % 16 == 0
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
    """`fourfold.kernels.small_batch.matmul_4bit` for what `takes` says."""
    num_columns = x.shape[-1]
    out = torch.empty([*x.shape[:-1], num_rows], dtype=x.dtype, device=x.device)
    x = x.reshape(-1, num_columns).contiguous()
    if x.data_ptr() % 4:
        x = x.clone()
    num_inputs = x.shape[0]
    block_m = max(MIN_BLOCK_M, next_power_of_2(num_inputs))
    splits, spans = shares(num_rows, num_columns)
    packed = torch.empty([splits * spans * SPAN * block_m], dtype=x.dtype, device=x.device)
    partial = new_partial(out, splits, block_m)
    early = launches_early(x.device)
    with on_device(x):
        hopper_pack_kernel[(packed.numel() // (2 * PAIRS),)](
            packed, x, num_inputs, num_columns, PAIRS=PAIRS, BLOCK_M=block_m, EARLY=early, num_warps=8
        )
        hopper_matmul_kernel[(cdiv(num_rows, ROWS), splits)](
            *(partial, packed, codes, codebook, scales, code_map, nested_absmax, offset),
            *(bias if splits == 1 else None, num_inputs, num_rows, num_columns),
            NESTED_SHIFT=nested_block_size.bit_length() - 1,
            # The interpreter has no warps.
            LOOKUP="shuffle" if x.is_cuda else "gather",
            BLOCK_M=block_m,
            WARPS=WARPS,
            SPANS=spans,
            IS_SPLIT=splits > 1,
            EARLY=early,
            num_warps=WARPS,
            num_stages=STAGES,
            enable_fp_fusion=False,
            launch_pdl=early,
        )
        if splits > 1:
            sum_splits(out, partial, bias, num_inputs, early)
    return out
