"""The product of `small_batch` in Triton, for all GPUs.

What goes for all its kernels is told in `small_batch_parts_triton`. Here both operands come from registers. Of row r of
x, lane 4 r + q of a warp reads the sixteen bytes that belong to a word of codes. More than eight rows of x are first
brought into the order in which the lanes read them, so that the reads of a warp are whole lines. The warps of a program
share out the columns and meet only at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.blockwise_triton import code_points
from fourfold.kernels.launching import cdiv, launches_early, on_device
from fourfold.kernels.small_batch_parts_triton import from_quad, new_partial, places, store_sums, sum_splits
from fourfold.kernels.small_batch_tiles import Tile, configuration

__all__ = ["CHUNKS", "matmul"]

# Of eight neighbouring elements of x, to a program of the launch that packs it.
CHUNKS = 64


@triton.jit
def operand(tile: tl.tensor, ROWS: tl.constexpr, WARPS: tl.constexpr) -> tl.tensor:
    """[places, 8] as [WARPS, ROWS, 32], each lane's columns where the tensor cores look for them."""
    parted = tile.reshape(ROWS // 8, WARPS, 8, 4, 2, 2, 2)
    return parted.permute(1, 0, 2, 4, 5, 3, 6).reshape(WARPS, ROWS, 32)


@triton.jit
def scale_parts(
    scale: tl.tensor,
    element: tl.tensor,
    inside: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    NESTED_BLOCK_SHIFT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A quantized scale's value and the absmax that it is multiplied by; an fp32 scale, twice."""
    value = scale
    nested_absmax = scale
    if code_map_ptr is not None:
        value = tl.load(code_map_ptr + scale.to(tl.int32))
        nested_absmax = tl.load(nested_absmax_ptr + (element >> NESTED_BLOCK_SHIFT), mask=inside, other=0.0)
    return value, nested_absmax


# In both, one kernel for all numbers of rows that share a tile.
@triton.jit(do_not_specialize=["num_inputs"])
def pack_kernel(
    packed_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_columns: tl.tensor,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WORDS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """x [num_inputs, num_columns] as [groups of 32 columns, BLOCK_M / 8, 8 (r), 4 (q), 8], zeros where x has nothing.

    Group g has word g % WORDS of each of the four lanes q that share 32 WORDS columns.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    q = chunk % 4
    m = chunk // 4 % BLOCK_M
    group = chunk // (4 * BLOCK_M)
    column = (group // WORDS * 4 + q) * (8 * WORDS) + group % WORDS * 8
    inside = ((m < num_inputs) & (column < num_columns))[:, None]
    # Rounded to what it is a multiple of anyway, so that Triton knows it and loads sixteen bytes at once.
    source = (m * num_columns + column) // 8 * 8
    eight = tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + source[:, None] + eight, mask=inside, other=0.0)
    tl.store(packed_ptr + chunk[:, None] * 8 + eight, x)


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
    IS_QUAD: tl.constexpr,
    IS_PACKED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """One warp: BLOCK_N rows of W and STEPS times 32 WORDS columns.

    IS_QUAD: A quad's lanes share out the scales; STEPS are whole spans, and rows whole blocks.
    IS_PACKED: `x` is what `pack_kernel` makes.
    IS_EVEN: The columns fill all steps of all warps.
    IS_SPLIT: `out` is fp32 [splits, num_rows, BLOCK_M]; otherwise the result [num_inputs, num_rows].
    """
    COLUMNS: tl.constexpr = 32 * WORDS
    WARPS: tl.constexpr = ROW_WARPS * COLUMN_WARPS
    ROWS: tl.constexpr = ROW_WARPS * BLOCK_N
    # The steps whose scales a lane reads at once, and their columns.
    SPAN_STEPS: tl.constexpr = (4 << BLOCK_SHIFT) // COLUMNS if IS_QUAD else 1
    SPAN: tl.constexpr = SPAN_STEPS * COLUMNS
    LAST_SPAN: tl.constexpr = STEPS * COLUMNS - SPAN
    dtype = x_ptr.dtype.element_ty
    PLACES: tl.constexpr = 4 * BLOCK_N * WARPS
    q, r, warp, block = places(BLOCK_N, WARPS)
    first = (tl.program_id(1) * COLUMN_WARPS + warp // ROW_WARPS) * (STEPS * COLUMNS)
    start = first + q * (8 * WORDS)
    # Rows that are not there are read as the last one, which is cheaper than a mask: their sums are never stored.
    n = (tl.program_id(0) * ROW_WARPS + warp % ROW_WARPS) * BLOCK_N + block * 8 + r
    row_start = tl.minimum(n, num_rows - 1) * num_columns
    x_q, x_r, x_warp, x_block = places(BLOCK_M, WARPS)
    x_first = (tl.program_id(1) * COLUMN_WARPS + x_warp // ROW_WARPS) * (STEPS * COLUMNS)
    x_start = x_first + x_q * (8 * WORDS)
    if IS_PACKED:
        x_place = x_first * BLOCK_M + x_block * 256 + x_r * 32 + x_q * 8
    else:
        x_place = tl.minimum(x_block * 8 + x_r, num_inputs - 1) * num_columns + x_start
    # From one step, and one word, to the next.
    X_STEP: tl.constexpr = COLUMNS * BLOCK_M if IS_PACKED else COLUMNS
    X_WORD: tl.constexpr = 32 * BLOCK_M if IS_PACKED else 8
    # Rounded to what they are multiples of anyway, so that Triton knows it and loads sixteen bytes at once.
    x_ptrs = x_ptr + ((x_place // 8 * 8)[:, None] + tl.arange(0, 8)[None, :])
    word = ((row_start + start) // (8 * WORDS) * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
    word_ptrs = codes_ptr.to(tl.pointer_type(tl.int32)) + word
    shift = (tl.arange(0, 8)[None, :] ^ 1) * 4
    total = tl.full([WARPS, BLOCK_N, BLOCK_M], 0.0, tl.float32)
    # Codes are loaded a step ahead. They are read once, and leave the L1 cache to x.
    inside = (start < num_columns) | IS_EVEN
    words = tl.load(word_ptrs, mask=inside[:, None], other=0, eviction_policy="evict_first")
    # Scales are loaded two spans ahead, and what nested ones are decoded with one span ahead.
    own = first + (q << BLOCK_SHIFT) if IS_QUAD else start
    own_element = row_start + own
    own_inside = (own < num_columns) | IS_EVEN
    scale = tl.load(scales_ptr + (own_element >> BLOCK_SHIFT), mask=own_inside, other=0)
    NESTED_BLOCK_SHIFT: tl.constexpr = BLOCK_SHIFT + NESTED_SHIFT
    value, nested_absmax = scale_parts(
        scale, own_element, own_inside, code_map_ptr, nested_absmax_ptr, NESTED_BLOCK_SHIFT
    )
    ahead = tl.minimum(SPAN, LAST_SPAN)
    own_inside = (own + ahead < num_columns) | IS_EVEN
    scale = tl.load(scales_ptr + ((own_element + ahead) >> BLOCK_SHIFT), mask=own_inside, other=0)
    if code_map_ptr is not None:
        offset = tl.load(offset_ptr)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    # Not `value`: Triton would see one tensor under two names, which the loop's first pass leaves as it is where scales
    # are not nested, and carry `absmax` to no later pass.
    absmax = tl.full([PLACES], 0.0, tl.float32)
    for step in range(STEPS):
        if step % SPAN_STEPS == 0:
            absmax = value
            if code_map_ptr is not None:
                # Two roundings: fused multiply-adds must be off.
                absmax = value * nested_absmax + offset
            value, nested_absmax = scale_parts(
                scale, own_element + ahead, own_inside, code_map_ptr, nested_absmax_ptr, NESTED_BLOCK_SHIFT
            )
            ahead = tl.minimum(step * COLUMNS + 2 * SPAN, LAST_SPAN)
            own_inside = (own + ahead < num_columns) | IS_EVEN
            scale = tl.load(scales_ptr + ((own_element + ahead) >> BLOCK_SHIFT), mask=own_inside, other=0)
        factor = absmax
        if IS_QUAD:
            holder = ((step * COLUMNS + q * (8 * WORDS)) >> BLOCK_SHIFT) % 4
            factor = from_quad(absmax, holder, PLACES)
        factor = factor.reshape(PLACES, 1)
        if WORDS == 4:
            even, odd = tl.split(words.reshape(PLACES, 2, 2))
            word0, word2 = tl.split(even)
            word1, word3 = tl.split(odd)
        else:
            word0, word1 = tl.split(words)
            word2, word3 = word0, word1
        x_inside = (x_start + step * COLUMNS < num_columns) | IS_EVEN | IS_PACKED
        column = tl.minimum(step + 1, STEPS - 1) * COLUMNS
        inside = (start + column < num_columns) | IS_EVEN
        words = tl.load(word_ptrs + column // 8, mask=inside[:, None], other=0, eviction_policy="evict_first")
        for i in tl.static_range(WORDS):
            held = word0 if i == 0 else word1 if i == 1 else word2 if i == 2 else word3
            code = held.reshape(PLACES, 1) >> shift
            weight = (code_points(code, codebook_ptr, BITS=4, LOOKUP=LOOKUP) * factor).to(dtype)
            x = tl.load(x_ptrs + (step * X_STEP + i * X_WORD), mask=x_inside[:, None], other=0.0)
            right = operand(x, BLOCK_M, WARPS).permute(0, 2, 1)
            total = tl.dot(operand(weight, BLOCK_N, WARPS), right, total)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    result = tl.sum(total.reshape(COLUMN_WARPS, ROWS, BLOCK_M), axis=0)
    store_sums(out_ptr, result, bias_ptr, num_inputs, num_rows, IS_SPLIT)


def packed(x: Tensor, tile: Tile, groups: int, early: bool) -> Tensor:
    """`pack_kernel` of x [M, K], with as many groups of 32 columns."""
    out = torch.empty([groups, tile.block_m, 32], dtype=x.dtype, device=x.device)
    pack_kernel[(out.numel() // (8 * CHUNKS),)](
        *(out, x, *x.shape),
        CHUNKS=CHUNKS,
        BLOCK_M=tile.block_m,
        WORDS=tile.words,
        EARLY=early,
        num_warps=2,
    )
    return out


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
    tile: Tile | None = None,
) -> Tensor:
    """`fourfold.kernels.small_batch.matmul_4bit` for what `serves` says; `tile`: another than the shape's own."""
    num_columns = x.shape[-1]
    out = torch.empty([*x.shape[:-1], num_rows], dtype=x.dtype, device=x.device)
    x = x.reshape(-1, num_columns).contiguous()
    if codes.data_ptr() % 4:
        codes = codes.clone()
    num_inputs = x.shape[0]
    tile, splits, steps, is_quad = configuration(num_inputs, num_rows, num_columns, block_size, tile)
    groups = tile.column_warps * splits * steps * tile.words
    early = launches_early(x.device)
    partial = new_partial(out, splits, tile.block_m)
    with on_device(x):
        if tile.is_packed:
            x = packed(x, tile, groups, early)
        matmul_kernel[(cdiv(num_rows, tile.row_warps * tile.block_n), splits)](
            *(partial, x, codes, codebook, scales, code_map, nested_absmax, offset),
            *(bias if splits == 1 else None, num_inputs, num_rows, num_columns),
            BLOCK_SHIFT=block_size.bit_length() - 1,
            NESTED_SHIFT=nested_block_size.bit_length() - 1,
            # The interpreter has no warps.
            LOOKUP="shuffle" if x.is_cuda else "gather",
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            ROW_WARPS=tile.row_warps,
            COLUMN_WARPS=tile.column_warps,
            WORDS=tile.words,
            STEPS=steps,
            IS_QUAD=is_quad,
            IS_PACKED=tile.is_packed,
            IS_EVEN=groups * 32 == num_columns,
            IS_SPLIT=splits > 1,
            EARLY=early,
            num_warps=tile.row_warps * tile.column_warps,
            num_stages=1,
            enable_fp_fusion=False,
            launch_pdl=early and tile.is_packed,
        )
        if splits > 1:
            sum_splits(out, partial, bias, num_inputs, early)
    return out
