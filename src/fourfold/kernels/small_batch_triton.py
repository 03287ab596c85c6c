"""The product of `small_batch` in Triton.

Decoding takes the time, so a weight is decoded in the very register in which the tensor cores want it: nothing of W
passes through shared memory. In a product of the tensor cores, out^T += W x^T over 16 columns, lane 4 r + q of a warp
holds of rows r and r + 8 of W, and of row r of x, the columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. The order of the
columns in a sum is free, so those four are made to be neighbours in memory: the lane reads whole words of codes, eight
columns each, and the sixteen bytes of x that belong to such a word.

Tiles have one dimension for [rows / 8, WARPS, 8 (r), 4 (q)] and one for what a lane loads at once: Triton deals the
elements of a dimension to the lanes, then to the warps, so that what is loaded is the operand already, and no layout is
converted. In which order it deals several dimensions depends on its version. Shapes are changed by `reshape` and not by
`[..., None]` because only that lets Triton carry a load's layout on.

The four lanes that share a row of W, a quad, go through a span of four blocks together: each decodes the scale of one
block, and hands it to the others when its turn comes. More than eight rows of x are first brought into the order in
which the lanes read them, so that the reads of a warp are whole lines.

The warps of a program share out the columns and meet only at the end. Where the rows of W still give too few warps to
fill the GPU, programs share the columns too, and another launch adds their fp32 sums, always in the same order. From
compute capability 9.0 on, a launch begins while the one before is ending, and waits only before it reads its results.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.blockwise_triton import code_points
from fourfold.kernels.launching import cdiv, launches_early, on_device
from fourfold.kernels.small_batch_tiles import Tile, configuration

__all__ = ["matmul"]


@triton.jit
def places(ROWS: tl.constexpr, WARPS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """q, r, the warp and the block of 8 rows of all [ROWS / 8, WARPS, 8 (r), 4 (q)], each in one dimension."""
    place = tl.arange(0, 4 * ROWS * WARPS)
    return place % 4, place // 4 % 8, place // 32 % WARPS, place // (32 * WARPS)


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


# In all three, one kernel for all numbers of rows that share a tile.
@triton.jit(do_not_specialize=["num_inputs"])
def pack_kernel(
    out_ptr: tl.tensor,
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
    tl.store(out_ptr + chunk[:, None] * 8 + eight, x)


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
    absmax = value
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
            quads = absmax.reshape(PLACES // 4, 4)
            factor = tl.gather(quads, holder.reshape(PLACES // 4, 4), 1)
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


@triton.jit(do_not_specialize=["num_inputs"])
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
    """The sum over the first axis of fp32 [SPLITS, num_rows, BLOCK_M], with the bias, as [num_inputs, num_rows]."""
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


def packed(x: Tensor, tile: Tile, groups: int, early: bool) -> Tensor:
    """`pack_kernel` of x [M, K], with as many groups of 32 columns."""
    out = torch.empty([groups, tile.block_m, 32], dtype=x.dtype, device=x.device)
    chunks = 64
    pack_kernel[(groups * tile.block_m * 4 // chunks,)](
        *(out, x, *x.shape),
        CHUNKS=chunks,
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
    # Only what follows a launch of ours: what came before that one has ended by then.
    follows: dict[str, bool] = {"launch_pdl": True} if early else {}
    partial = out
    if splits > 1:
        partial = torch.empty([splits, num_rows, tile.block_m], dtype=torch.float32, device=x.device)
    with on_device(x):
        if tile.is_packed:
            x = packed(x, tile, groups, early)
        matmul_kernel[(cdiv(num_rows, tile.row_warps * tile.block_n), splits)](
            *(partial, x, codes, codebook, scales, code_map, nested_absmax, offset, bias),
            *(num_inputs, num_rows, num_columns),
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
            **(follows if tile.is_packed else {}),
        )
        if splits > 1:
            # Fewer rows a program where there are few, so that the programs fill the GPU.
            block_n = 8 if num_rows <= 4096 else 32
            sum_kernel[(cdiv(num_rows, block_n),)](
                *(out, partial, bias, num_inputs, num_rows),
                BLOCK_M=tile.block_m,
                BLOCK_N=block_n,
                SPLITS=splits,
                EARLY=early,
                num_warps=4,
                **follows,
            )
    return out
