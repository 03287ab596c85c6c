"""One or two rows of x in `decode_linear`: the columns of the tensor cores' result tell blocks apart, not rows of x.

The tensor cores multiply W with eight columns at least, of which one row of x would use one. Here column n has row
n // 4 of x where a lane's codes are of a span's block n % 4, and zeros elsewhere. So the sums of a span's four blocks
come out beside each other, and lanes that share a row of W need not go through the same block: each reads sixteen bytes
at once. Two quads share four rows of W, of which one has the first two blocks of a span and the other the last two: the
eight lanes read a whole line of the L1 cache at a time, whose requests are what bounds the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.decode_lookup_triton import fill_table
from fourfold.kernels.decode_result_triton import load_low, load_up, prefetch_up, rows_of_program, store_result
from fourfold.kernels.decode_scales_triton import absmax_of, load_scale_words, load_scales, pack
from fourfold.kernels.decode_span_triton import issued, load_words, of_rows
from fourfold.kernels.decode_sums_triton import held_sums, looped_sums, sums_of_tiles
from fourfold.kernels.early_triton import begin, wait

__all__ = ["decode_spread_kernel"]

# All of which a lane asks for at the beginning; where there are more, it asks for one while it works on another.
HELD_SPANS = tl.constexpr(4)


# One kernel for all numbers of rows that share a tile.
@triton.jit(do_not_specialize=["num_inputs", "row_1", "row_2", "num_rows", "zero"])
def decode_spread_kernel(
    out_ptr: tl.tensor,
    x_ptr: tl.tensor,
    codes_0: tl.tensor,
    codes_1: tl.tensor,
    codes_2: tl.tensor,
    codebook_ptr: tl.tensor,
    scales_0: tl.tensor,
    scales_1: tl.tensor,
    scales_2: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_0: tl.tensor,
    nested_1: tl.tensor,
    nested_2: tl.tensor,
    offset_0: tl.tensor,
    offset_1: tl.tensor,
    offset_2: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    low_ptr: tl.tensor,
    up_ptr: tl.tensor,
    num_inputs: tl.tensor,
    row_1: tl.tensor,
    row_2: tl.tensor,
    num_rows: tl.tensor,
    x_scale: tl.tensor,
    out_scale: tl.tensor,
    zero: tl.tensor,
    partial_ptr: tl.tensor,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    LOOKUP: tl.constexpr,
    PACKED: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    COLUMN_WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    TILES: tl.constexpr,
    HELD_TILES: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """ROW_WARPS times 16 rows of the members' W, one over the other: member i begins with row_i.

    A warp takes SPANS spans of 256 columns.
    zero: 0, of which the compiler does not know it.
    PACKED: Whether `decode_scales_triton` keeps the scales.
    TILES, HELD_TILES: Times 16 rows that a program takes one after the other, and a power of two from there on. With
        more than one there are one row warp, at most two spans, and PACKED.
    Else see `decode_linear_kernel`.
    """
    begin(EARLY, True)
    WARPS: tl.constexpr = ROW_WARPS * COLUMN_WARPS
    CHECKED: tl.constexpr = SPANS * COLUMN_WARPS * 4 != COLUMNS // 64
    HELD: tl.constexpr = SPANS <= HELD_SPANS and TILES == 1
    # Of a warp, and of the program.
    OUT_ROWS: tl.constexpr = 16 if ACTIVATION == "" else 8
    first_row = tl.program_id(0) * (ROW_WARPS * TILES * OUT_ROWS)
    # As words before they are chosen from: Triton from 3.7 on forgets how a chosen pointer is aligned once it is cast.
    of_words: tl.tuple = (codes_0.to(tl.pointer_type(tl.int32)),)
    of_scales: tl.tuple = (scales_0,)
    of_nested: tl.tuple = (scales_0,)
    of_offsets: tl.tuple = (0.0,)
    if code_map_ptr is not None:
        of_nested = (nested_0,)
        of_offsets = (tl.load(offset_0),)
    for other in tl.static_range(1, 3):
        if (codes_1 if other == 1 else codes_2) is not None:
            of_words = of_words + ((codes_1 if other == 1 else codes_2).to(tl.pointer_type(tl.int32)),)  # noqa: RUF005
            of_scales = of_scales + ((scales_1 if other == 1 else scales_2),)  # noqa: RUF005
            if code_map_ptr is not None:
                of_nested = of_nested + ((nested_1 if other == 1 else nested_2),)  # noqa: RUF005
                of_offsets = of_offsets + (tl.load(offset_1 if other == 1 else offset_2),)  # noqa: RUF005
    members = (of_words, of_scales, of_nested, of_offsets)
    rows = (row_1, row_2, num_rows)
    of_words, lanes = of_rows(first_row, members, rows, COLUMNS, SPANS, ROW_WARPS, OUT_ROWS, ACTIVATION, WARPS)
    # Of the first span, or, where all are held, of each.
    none = of_words[1] * 0
    words: tl.tuple = ()
    for span in tl.static_range(SPANS if HELD else 1):
        words = words + (load_words(of_words, none, span, True, COLUMNS, CHECKED),)  # noqa: RUF005
    scales: tl.tuple = ()
    decoding: tl.tuple = ()
    if PACKED:
        scales, decoding = load_scale_words(lanes, lanes[3] * 0, COLUMNS, NESTED_SHIFT, SPANS)
    else:
        for span in tl.static_range(SPANS if HELD else 1):
            scales = scales + (load_scales(lanes, span, code_map_ptr, COLUMNS, NESTED_SHIFT),)  # noqa: RUF005
    issued(zero, 9, LOOKUP)
    table = 0
    map_at = 0
    if LOOKUP == "table":
        table, map_at = fill_table(codebook_ptr, code_map_ptr if PACKED else None, WARPS)
    if PACKED and TILES == 1:
        scales = pack(scales, lanes, SPANS)
    if HELD:
        absmax: tl.tuple = ()
        for span in tl.static_range(SPANS):
            own = absmax_of(
                *(scales if PACKED else scales[span], span, decoding, lanes, span, map_at, code_map_ptr),
                *(LOOKUP, COLUMNS, NESTED_SHIFT, PACKED, CHECKED),
            )
            absmax = absmax + (own,)  # noqa: RUF005
    row, is_row = rows_of_program(first_row, row_1, num_rows, 16, ROW_WARPS * HELD_TILES, ACTIVATION)
    if TILES < HELD_TILES:
        is_row = is_row & (tl.arange(0, 16 * HELD_TILES) < 16 * TILES)
    if RANK > 0:
        # Rows that are not there have an adapter that is.
        member = tl.minimum(tl.where(row >= row_2, 2, tl.where(row >= row_1, 1, 0)), RANKS // RANK - 1)
        if TILES == 1:
            up = load_up(up_ptr, row, is_row, 0, RANK, min(RANK, 32))
        else:
            prefetch_up(up_ptr, row, is_row, RANK, LOOKUP)
    wait(EARLY, True)
    # What the end needs is asked for at the beginning, unless there is much between.
    inputs = tl.arange(0, 2)
    mask = is_row[:, None] & (inputs < num_inputs)[None, :]
    residual = 0
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + (inputs[None, :] * num_rows + row[:, None]), mask=mask, other=0.0)
    if RANK > 0:
        low_at = member * RANK
        second_low = tl.minimum(1, num_inputs - 1) * RANKS
        if TILES == 1:
            low0 = load_low(low_ptr, low_at, min(RANK, 32))
            low1 = load_low(low_ptr, low_at + second_low, min(RANK, 32))
    if TILES > 1:
        total = sums_of_tiles(
            *(partial_ptr, x_ptr, num_inputs, words[0], scales, decoding, of_words, lanes, first_row, members, rows),
            *(zero, table, map_at, codebook_ptr, code_map_ptr, LOOKUP, COLUMNS, NESTED_SHIFT, WARPS, SPANS, TILES),
            *(HELD_TILES, OUT_ROWS, ACTIVATION, CHECKED),
        )
    elif HELD:
        total = held_sums(
            *(x_ptr, num_inputs, words, absmax, lanes, table, codebook_ptr, LOOKUP, COLUMNS, WARPS, SPANS, CHECKED),
        )
    else:
        total = looped_sums(
            *(x_ptr, num_inputs, words[0], scales if PACKED else scales[0], decoding, of_words, lanes, zero, table),
            *(map_at, codebook_ptr, code_map_ptr, LOOKUP, COLUMNS, NESTED_SHIFT, WARPS, SPANS, PACKED, CHECKED),
        )
    ALL_ROWS: tl.constexpr = ROW_WARPS * HELD_TILES * 16
    if COLUMN_WARPS == 1:
        result = total.reshape(ALL_ROWS, 2) * x_scale
    else:
        result = tl.sum(total.reshape(COLUMN_WARPS, ALL_ROWS, 2), axis=0) * x_scale
    if RANK > 0:
        # A few ranks at a time: what passes through shared memory has to fit beside the table.
        FEW: tl.constexpr = min(RANK, 32)
        for start in tl.static_range(0, RANK, FEW):
            if start > 0 or TILES > 1:
                up = load_up(up_ptr, row, is_row, start, RANK, FEW)
                low0 = load_low(low_ptr, low_at + start, FEW)
                low1 = load_low(low_ptr, low_at + start + second_low, FEW)
            result += tl.join(tl.sum(up.to(tl.float32) * low0, axis=1), tl.sum(up.to(tl.float32) * low1, axis=1))
    store_result(
        *(out_ptr, result, bias_ptr, residual_ptr, residual, row, is_row, inputs, mask, num_inputs, first_row),
        *(row_1, num_rows, out_scale, True, ROW_WARPS * HELD_TILES, ROW_WARPS * TILES, OUT_ROWS, ACTIVATION, DTYPE),
    )
