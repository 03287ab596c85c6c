"""The product of `decode_linear` in Triton: up to 64 rows of x, blocks of 64, bound by requests to the L1 cache.

A byte of codes is decoded by one lookup: its two code points, in fp16, are an entry of a table in shared memory, of
which each lane has a copy in a bank of its own, so that no two lanes ever wait for each other. What is looked up goes
to the tensor cores as it is: the lane that loaded a word holds the part of the operand that is made of it (see
`small_batch_parts_triton`). The scale of a block is multiplied with the block's sums, in fp32.

The warps of a program share out rows of W, and columns: those of the same rows add their sums up at the end, always in
the same order. A lane has the codes of a span of four blocks on their way while it works on the one before. Everything
that is no activation is loaded before the launch waits for the one before it. One row of x or two are multiplied in
another way: see `decode_spread_triton`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.decode_lookup_triton import decoded, fill_table
from fourfold.kernels.decode_result_triton import load_up, rows_of_program, store_result
from fourfold.kernels.decode_spread_triton import decode_spread_kernel
from fourfold.kernels.decode_tiles import Tile, packs, spreads, tile_for
from fourfold.kernels.early_triton import AT_ONCE_ROWS, begin, wait
from fourfold.kernels.group_expansion_triton import of_member
from fourfold.kernels.launching import cdiv, launches_early, on_device
from fourfold.kernels.small_batch_parts_triton import from_quad, places
from fourfold.kernels.small_batch_triton import operand

__all__ = ["LOOKUP", "MAX_MEMBERS", "decode_linear"]

MAX_MEMBERS = 3
# How codes are looked up: "table" in shared memory, or "shuffle" among the lanes of a warp.
LOOKUP = "table"


@triton.jit
def of_sums(value: tl.tensor, ROWS: tl.constexpr, WARPS: tl.constexpr, BLOCK_M: tl.constexpr) -> tl.tensor:
    """[places], the same for all lanes q, as [WARPS, ROWS, BLOCK_M]: each lane's own where its sums are."""
    parted = value.reshape(ROWS // 8, WARPS, 8, 1, 4, 1)
    parted = tl.broadcast_to(parted, (ROWS // 8, WARPS, 8, BLOCK_M // 8, 4, 2))
    return parted.permute(1, 0, 2, 3, 4, 5).reshape(WARPS, ROWS, BLOCK_M)


@triton.jit
def block_words(
    codes_ptr: tl.tensor, word: tl.tensor, block: tl.tensor, is_there: tl.tensor, BLOCKS: tl.constexpr
) -> tl.tensor:
    """[places, 2] words of codes: those of a block of 64 that a lane decodes, which are read once. Zeros unless
    `is_there`, and behind BLOCKS blocks of a row; 0: none lies there."""
    at = (codes_ptr + (word + block * 8))[:, None] + tl.arange(0, 2)[None, :]
    inside = tl.full(word.shape, 1, tl.int1) & is_there
    if BLOCKS > 0:
        inside = inside & (block < BLOCKS)
    return tl.load(at, mask=inside[:, None], other=0, eviction_policy="evict_first")


@triton.jit
def block_sums(
    total: tl.tensor,
    weight0: tl.tensor,
    weight1: tl.tensor,
    factor: tl.tensor,
    x_ptr: tl.tensor,
    x_at: tl.tensor,
    WARPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """`total` [WARPS, rows of W, BLOCK_M] and factor times the sums over a block of 64 columns, of which a lane has two
    words."""
    eight = tl.arange(0, 8)[None, :]
    x0 = tl.load(x_ptr + (x_at[:, None] + eight))
    x1 = tl.load(x_ptr + ((x_at + 8)[:, None] + eight))
    sums = tl.full(total.shape, 0.0, tl.float32)
    sums = tl.dot(weight0, operand(x0, BLOCK_M, WARPS).permute(0, 2, 1), sums)
    sums = tl.dot(weight1, operand(x1, BLOCK_M, WARPS).permute(0, 2, 1), sums)
    return tl.fma(sums, factor, total)


# One kernel for all numbers of rows that share a tile.
@triton.jit(do_not_specialize=["num_inputs", "row_1", "row_2", "num_rows"])
def decode_linear_kernel(
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
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    LOOKUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    COLUMN_WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """ROW_WARPS times ROWS rows of the members' W, one over the other: member i begins with row_i.

    A warp takes SPANS spans of 256 columns, of which a quad's lanes share out the scales of the four blocks.
    ROWS, ROW_WARPS, COLUMN_WARPS: See `Tile`.
    RANK, RANKS: Low-rank columns of a member and of all, in `low`; of `up`, those of its own member. 0: no adapter.
    ACTIVATION: "" or what gates: half of the rows are gate's, half the same of up, and `out` is their product.
    """
    begin(EARLY, AT_ONCE)
    WARPS: tl.constexpr = ROW_WARPS * COLUMN_WARPS
    BLOCKS: tl.constexpr = COLUMNS // 64
    LAST: tl.constexpr = BLOCKS - 1
    IS_EVEN: tl.constexpr = SPANS * COLUMN_WARPS * 4 == BLOCKS
    # A row that lies in one block of scales has one number to decode them with. (Where a warp shares rows with all
    # others, keeping it would cost 32 rows of x a third program at a time: 23 us instead of 17 for q, k and v.)
    IS_ROWS: tl.constexpr = (1 << NESTED_SHIFT) % BLOCKS == 0 and (BLOCK_M == 8 or ROW_WARPS > 1)
    # Blocks that are not there have a scale of 0, and the last one's columns of x.
    CHECKED: tl.constexpr = 0 if IS_EVEN else BLOCKS
    PLACES: tl.constexpr = 4 * ROWS * WARPS
    # Of a warp, and of the program.
    OUT_ROWS: tl.constexpr = ROWS if ACTIVATION == "" else ROWS // 2
    ALL_ROWS: tl.constexpr = ROW_WARPS * OUT_ROWS
    # Programs that read the same rows of W are neighbours, so that all but one find them in the L2 cache.
    num_tiles = tl.cdiv(num_inputs, BLOCK_M)
    first_row = tl.program_id(0) // num_tiles * ALL_ROWS
    first_input = tl.program_id(0) % num_tiles * BLOCK_M
    # Rows that are not there are read as the last ones, which is cheaper than a mask: their sums are never stored.
    q, r, warp, block = places(ROWS, WARPS)
    n = first_row + warp % ROW_WARPS * OUT_ROWS + block * 8 + r
    if ACTIVATION != "":
        n = tl.where(block < ROWS // 16, tl.minimum(n, row_1 - 1), tl.minimum(n - ROWS // 2, row_1 - 1) + row_1)
    n = tl.minimum(n, num_rows - 1)
    # As words before they are chosen from: Triton from 3.7 on forgets how a chosen pointer is aligned once it is cast.
    words_0 = codes_0.to(tl.pointer_type(tl.int32))
    words_1 = codes_1
    words_2 = codes_2
    if codes_1 is not None:
        words_1 = codes_1.to(tl.pointer_type(tl.int32))
    if codes_2 is not None:
        words_2 = codes_2.to(tl.pointer_type(tl.int32))
    words_ptr = tl.multiple_of(of_member(n, row_1, row_2, words_0, words_1, words_2), 16)
    scales_ptr = of_member(n, row_1, row_2, scales_0, scales_1, scales_2)
    n_own = n
    if codes_1 is not None:
        n_own = tl.where(n >= row_1, n - row_1, n_own)
    if codes_2 is not None:
        n_own = tl.where(n >= row_2, n - row_2, n_own)
    row_start = n_own * COLUMNS
    first = warp // ROW_WARPS * (SPANS * 4)
    nested_ptr = scales_ptr
    offset = row_start.to(tl.float32)
    if code_map_ptr is not None:
        nested_ptr = of_member(n, row_1, row_2, nested_0, nested_1, nested_2)
        offset = tl.load(of_member(n, row_1, row_2, offset_0, offset_1, offset_2))
    # Rounded to what it is a multiple of anyway, so that Triton knows it and loads eight bytes at once.
    word = (row_start + q * 16) // 16 * 2
    words0 = block_words(words_ptr, word, first, SPANS > 0, CHECKED)
    words1 = block_words(words_ptr, word, first + 1, SPANS > 0, CHECKED)
    words2 = block_words(words_ptr, word, first + 2, SPANS > 0, CHECKED)
    words3 = block_words(words_ptr, word, first + 3, SPANS > 0, CHECKED)
    # Scales are loaded two spans ahead, and what nested ones are decoded with one span ahead.
    own = first + q
    row_block = n_own * BLOCKS
    value = tl.load(scales_ptr + (row_block + tl.minimum(own, LAST)))
    nested_absmax = tl.full([PLACES], 0.0, tl.float32)
    scale = value
    if code_map_ptr is not None:
        nested_absmax = tl.load(nested_ptr + ((row_block + tl.minimum(own, LAST)) >> NESTED_SHIFT))
        point = tl.load(code_map_ptr + value.to(tl.int32))
        scale = tl.load(scales_ptr + (row_block + tl.minimum(own + 4, LAST)))
    else:
        point = value
    table = 0
    if LOOKUP == "table":
        table, _ = fill_table(codebook_ptr, None, WARPS)
    x_q, x_r, x_warp, x_block = places(BLOCK_M, WARPS)
    x_first = x_warp // ROW_WARPS * (SPANS * 4)
    m = first_input + x_block * 8 + x_r
    x_place = (tl.minimum(m, num_inputs - 1) * COLUMNS + x_q * 16) // 16 * 16
    total = tl.full([WARPS, ROWS, BLOCK_M], 0.0, tl.float32)
    wait(EARLY, AT_ONCE)
    for step in range(SPANS):
        now = own + step * 4
        absmax = point
        if code_map_ptr is not None:
            # Two roundings: fused multiply-adds must be off.
            absmax = point * nested_absmax + offset
        if not IS_EVEN:
            absmax = tl.where(now < BLOCKS, absmax, 0.0)
        after = tl.minimum(now + 4, LAST)
        if code_map_ptr is not None:
            point = tl.load(code_map_ptr + scale.to(tl.int32))
            if not IS_ROWS:
                nested_absmax = tl.load(nested_ptr + ((row_block + after) >> NESTED_SHIFT))
            scale = tl.load(scales_ptr + (row_block + tl.minimum(now + 8, LAST)))
        else:
            point = tl.load(scales_ptr + (row_block + after))
        for j in tl.static_range(4):
            words = words0 if j == 0 else words1 if j == 1 else words2 if j == 2 else words3
            ahead = block_words(words_ptr, word, first + (step + 1) * 4 + j, step + 1 < SPANS, CHECKED)
            if j == 0:
                words0 = ahead
            elif j == 1:
                words1 = ahead
            elif j == 2:
                words2 = ahead
            else:
                words3 = ahead
            factor = of_sums(from_quad(absmax, q * 0 + j, PLACES), ROWS, WARPS, BLOCK_M)
            word0, word1 = tl.split(words)
            weight0 = operand(decoded(word0.reshape(PLACES, 1), table, codebook_ptr, LOOKUP), ROWS, WARPS)
            weight1 = operand(decoded(word1.reshape(PLACES, 1), table, codebook_ptr, LOOKUP), ROWS, WARPS)
            x_at = tl.minimum(x_first + step * 4 + j, LAST) * 64
            total = block_sums(total, weight0, weight1, factor, x_ptr, x_place + x_at, WARPS, BLOCK_M)
    if COLUMN_WARPS == 1:
        result = total.reshape(ROW_WARPS * ROWS, BLOCK_M) * x_scale
    else:
        result = tl.sum(total.reshape(COLUMN_WARPS, ROW_WARPS * ROWS, BLOCK_M), axis=0) * x_scale
    row, is_row = rows_of_program(first_row, row_1, num_rows, ROWS, ROW_WARPS, ACTIVATION)
    inputs = first_input + tl.arange(0, BLOCK_M)
    mask = is_row[:, None] & (inputs < num_inputs)[None, :]
    # A few ranks at a time: what passes through shared memory has to fit beside the table.
    FEW: tl.constexpr = min(RANK, 32)
    if RANK > 0:
        member = tl.where(row >= row_2, 2, tl.where(row >= row_1, 1, 0))
        for start in tl.static_range(0, RANK, FEW):
            up = load_up(up_ptr, row, is_row, start, RANK, FEW)
            for part in tl.static_range(RANKS // RANK):
                low_at = inputs[None, :] * RANKS + (part * RANK + start + tl.arange(0, FEW))[:, None]
                low = tl.load(low_ptr + low_at, mask=(inputs < num_inputs)[None, :], other=0.0)
                own_up = tl.where((member == part)[:, None], up, 0.0).to(up.dtype)
                result = tl.dot(own_up, low, result)
    store_result(
        *(out_ptr, result, bias_ptr, residual_ptr, 0, row, is_row, inputs, mask, num_inputs, first_row),
        *(row_1, num_rows, out_scale, False, ROW_WARPS, ROW_WARPS, OUT_ROWS, ACTIVATION, DTYPE),
    )


def decode_linear(
    x: Tensor,
    codes: Sequence[Tensor],
    codebook: Tensor,
    scales: Sequence[Tensor],
    code_map: Tensor | None,
    nested_absmax: Sequence[Tensor],
    offsets: Sequence[Tensor],
    nested_block_size: int,
    num_rows: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    activation: str,
    x_scale: float,
    out_scale: float,
    dtype: torch.dtype,
    lookup: str | None = None,
    early: bool | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`fourfold.kernels.decode_linear.decode_linear` for what `serves` says."""
    num_inputs, num_columns = x.shape
    total = sum(num_rows)
    width = num_rows[0] if activation else total
    out = torch.empty(num_inputs, width, dtype=x.dtype if activation else dtype, device=x.device)
    first = [*num_rows, 0, 0]
    # Behind all rows where there is no such member.
    row_1 = first[0]
    row_2 = first[0] + first[1] if len(num_rows) > 2 else total
    early = launches_early(x.device) if early is None else early
    # The interpreter has no lanes, and no shared memory.
    lookup = (lookup or LOOKUP) if x.is_cuda else "gather"
    rank = 0 if up is None else up.shape[1]
    is_nested = code_map is not None
    tile = tile or tile_for(
        *(num_inputs, total, num_columns, _multiprocessors(x.device)),
        packed=is_nested and packs(num_columns, 4, nested_block_size) and spreads(num_inputs, num_rows, num_columns),
    )
    spans = cdiv(num_columns, 256 * tile.column_warps)
    out_rows = tile.row_warps * (tile.rows // 2 if activation else tile.rows)
    tensors = (
        *(out, x, *_three(codes), codebook, *_three(scales), code_map),
        *(*_three(nested_absmax), *_three(offsets), bias, residual, low, up),
        *(num_inputs, row_1, row_2, total, float(x_scale), float(out_scale)),
    )
    shared = {
        **{"COLUMNS": num_columns, "NESTED_SHIFT": nested_block_size.bit_length() - 1, "LOOKUP": lookup},
        **{"ROW_WARPS": tile.row_warps, "COLUMN_WARPS": tile.column_warps, "SPANS": spans},
        **{"RANK": rank, "RANKS": 0 if low is None else low.shape[1], "ACTIVATION": activation},
        **{"DTYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float16, "EARLY": early},
        **{"num_warps": tile.row_warps * tile.column_warps, "num_stages": 1, "enable_fp_fusion": False},
        **{"launch_pdl": early, "maxnreg": tile.registers},
    }
    with on_device(x):
        if tile.block_m == 8 and spreads(num_inputs, num_rows, num_columns):
            # Kept scales are loaded four bytes and more at a time.
            is_packed = is_nested and packs(num_columns, spans, nested_block_size)
            is_packed = is_packed and all(each.data_ptr() % 16 == 0 for each in scales)
            tiles = tile.tiles if is_packed and spans <= 2 else 1
            programs = cdiv(width, out_rows * tiles)
            partial = None
            if tiles > 1:
                partial = torch.empty(programs * tiles * tile.column_warps * 32, dtype=torch.float32, device=x.device)
            decode_spread_kernel[(programs,)](
                *(*tensors, 0, partial),
                **shared,
                PACKED=is_packed,
                TILES=tiles,
                HELD_TILES=triton.next_power_of_2(tiles),
            )
        else:
            decode_linear_kernel[(cdiv(width, out_rows) * cdiv(num_inputs, tile.block_m),)](
                *tensors, **shared, BLOCK_M=tile.block_m, ROWS=tile.rows, AT_ONCE=num_inputs <= AT_ONCE_ROWS
            )
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _three(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (MAX_MEMBERS - len(tensors))]
