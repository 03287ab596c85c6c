"""A span of 256 columns in `decode_spread_triton`: what a lane reads of W and x, and what a span adds to its sums."""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.decode_lookup_triton import decoded
from fourfold.kernels.decode_scales_triton import four_words
from fourfold.kernels.group_expansion_triton import of_member
from fourfold.kernels.small_batch_parts_triton import from_quad, places
from fourfold.kernels.small_batch_triton import operand

__all__ = ["issued", "joined", "load_words", "load_x", "of_rows", "sent", "with_span"]


@triton.jit
def _first_of_four(
    r: tl.tensor,
    warp: tl.tensor,
    first_row: tl.tensor,
    row_1: tl.tensor,
    num_rows: tl.tensor,
    OUT_ROWS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """The first of the four rows of all members' W that a lane reads. Rows that are not there are read as the last."""
    row = r // 2 * 4
    n = first_row + warp % ROW_WARPS * OUT_ROWS + row
    if ACTIVATION != "":
        n = tl.where(row < 8, tl.minimum(n, row_1 - 4), tl.minimum(n - 8, row_1 - 4) + row_1)
    return tl.minimum(n, num_rows - 4)


@triton.jit
def _of_member(n: tl.tensor, row_1: tl.tensor, row_2: tl.tensor, values: tl.tuple) -> tl.tensor:
    """Of up to three values that of the member to which row n belongs: the second from row_1 on, and so on."""
    second = values[1] if len(values) > 1 else None
    third = values[2] if len(values) > 2 else None
    return of_member(n, row_1, row_2, values[0], second, third)


@triton.jit
def of_rows(
    first_row: tl.tensor,
    members: tl.tuple,
    rows: tl.tuple,
    COLUMNS: tl.constexpr,
    SPANS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WARPS: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """What lanes read of the program's rows of W from `first_row` on.

    Args:
        members: Of each member words of codes, scales, and numbers and offset that nested ones are decoded with.
        rows: row_1, row_2 and num_rows: see the kernel.

    Returns:
        Of words of codes: where they lie, and [places] of row_start (first element of the first of four rows of W), q,
        half (of a span), second (0 or 1: a lane's two places) and the first block of a warp. Of scales: these, what
        nested ones are decoded with, offset, and [lanes] of row_start, q, r, of which even ones have the first half of
        a span, and the first block.
    """
    words, scales, nested, offsets = members
    row_1, row_2, num_rows = rows
    firsts: tl.tuple = (0, row_1, row_2)
    q, r, warp, second = places(16, WARPS)
    n = _first_of_four(r, warp, first_row, row_1, num_rows, OUT_ROWS, ROW_WARPS, ACTIVATION)
    words_ptr = tl.multiple_of(_of_member(n, row_1, row_2, words), 16)
    row_start = (n - _of_member(n, row_1, row_2, firsts[: len(words)])) * COLUMNS
    of_words = (words_ptr, row_start, q, r % 2, second, warp // ROW_WARPS * (SPANS * 4))
    q, r, warp, _ = places(8, WARPS)
    n = _first_of_four(r, warp, first_row, row_1, num_rows, OUT_ROWS, ROW_WARPS, ACTIVATION)
    row_start = (n - _of_member(n, row_1, row_2, firsts[: len(words)])) * COLUMNS
    scales_ptr = _of_member(n, row_1, row_2, scales)
    nested_ptr = _of_member(n, row_1, row_2, nested)
    offset = _of_member(n, row_1, row_2, offsets) + row_start * 0.0
    lanes = (scales_ptr, nested_ptr, offset, row_start, q, r, warp // ROW_WARPS * (SPANS * 4))
    return of_words, lanes


@triton.jit
def load_words(
    of_words: tl.tuple,
    known: tl.tensor,
    span: tl.tensor,
    is_there: tl.tensor,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """What a lane reads of a span: of rows `second` and 2 + `second` of four of W the words of codes [places, 4].

    Args:
        of_words: See `of_rows`.
        known: Zeros [places], before which nothing is asked for.
        is_there: Whether there is such a span; else zeros.
        CHECKED: Whether blocks may lie behind the row.
    """
    words_ptr, row_start, q, half, second, first = of_words
    ROW: tl.constexpr = COLUMNS // 8
    block = first + span * 4
    # Rounded to what it is a multiple of anyway, so that Triton knows it and loads sixteen bytes at once.
    word = (row_start + known) // 32 * 4 + second * ROW + block * 8 + half * 16 + q * 4
    at = (words_ptr + word)[:, None] + tl.arange(0, 4)[None, :]
    is_inside = tl.full(q.shape, 1, tl.int1) & is_there
    if CHECKED:
        is_inside = is_inside & (block + half * 2 + q // 2 < COLUMNS // 64)
    words0 = tl.load(at, mask=is_inside[:, None], other=0, eviction_policy="evict_first")
    words1 = tl.load(at + 2 * ROW, mask=is_inside[:, None], other=0, eviction_policy="evict_first")
    return words0, words1


@triton.jit
def load_x(
    x_ptr: tl.tensor,
    num_inputs: tl.tensor,
    lanes: tl.tuple,
    span: tl.tensor,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four times [lanes, 8] that go with the words of `load_words`: of column r of the tensor cores' result, lane q's
    part."""
    _, _, _, _, q, r, first = lanes
    BLOCKS: tl.constexpr = COLUMNS // 64
    m = r // 4
    half = r % 4 // 2
    has_x = (m < num_inputs) & (r % 2 == q // 2)
    block = tl.minimum(first + span * 4, (BLOCKS - 1) // 4 * 4) + half * 2
    if CHECKED:
        has_x = has_x & (block < BLOCKS)
    row = tl.minimum(m, num_inputs - 1) * COLUMNS
    at = (x_ptr + (row + block * 64 + q * 32) // 32 * 32)[:, None] + tl.arange(0, 8)[None, :]
    mask = has_x[:, None]
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + 8, mask=mask, other=0.0),
        tl.load(at + 16, mask=mask, other=0.0),
        tl.load(at + 24, mask=mask, other=0.0),
    )


@triton.jit
def _of_places(first: tl.tensor, second: tl.tensor) -> tl.tensor:
    """[places] of what a lane has for its one place and for the other."""
    return tl.join(first, second).permute(1, 0).reshape(2 * first.shape[0])


@triton.jit
def sent(LOOKUP: tl.constexpr) -> None:
    """The loads before this are on their way before what follows: ptxas would put them off to where they are needed."""
    if LOOKUP != "gather":
        tl.inline_asm_elementwise(
            "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def issued(zero: tl.tensor, number: tl.constexpr, LOOKUP: tl.constexpr) -> None:
    """The loads before this are on their way before what follows, and it does not wait for them.

    A warp counts its loads by six scoreboards, and waits for all that one of them counts. ptxas mixes what comes from
    far with lookups, except for loads that are needed in another basic block: those have one of their own. So this ends
    a block: a loop that is never gone through.

    Args:
        zero: 0, of which the compiler does not know it.
        number: From 1 on, another one for each: where conditions are the same, ptxas keeps the first.
    """
    if LOOKUP != "gather":
        tl.inline_asm_elementwise(
            """{
            .reg .pred never;
            again:
            setp.eq.u32 never, $1, $2;
            @!never bra done;
            nanosleep.u32 20;
            bra again;
            done:
            mov.u32 $0, 0;
            }""",
            "=r,r,n",
            [zero, number],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _factors(absmax: tl.tensor, first: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """[WARPS, 16, 8]: absmax of rows `first` and the next of each four, where their sums are."""
    PLACES: tl.constexpr = 64 * WARPS
    both = tl.join(from_quad(absmax, first, PLACES), from_quad(absmax, first + 1, PLACES))
    # blocks of the pair, warps, r, q, rows of the pair
    return both.reshape(2, WARPS, 8, 4, 2).permute(1, 4, 2, 3, 0).reshape(WARPS, 16, 8)


@triton.jit
def with_span(
    totals: tl.tuple,
    words: tl.tuple,
    x: tl.tuple,
    absmax: tl.tuple,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    WARPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both of `totals` and what a span adds.

    They are [WARPS, 16, 8], of the first and of the last two of each four rows of W: in rows r and r + 8 the sums of
    lane r's half of all spans; in column n those of row n // 4 of x over blocks n % 4 of a span, times their scales, if
    these are of that half.
    """
    PLACES: tl.constexpr = 64 * WARPS
    # Columns that belong to the other half get what nobody wants.
    sums0 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    sums1 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    four0, four1 = four_words(words[0]), four_words(words[1])
    for i in tl.static_range(4):
        columns = operand(x[i], 8, WARPS).permute(0, 2, 1)
        weight0 = operand(decoded(four0[i].reshape(PLACES, 1), table, codebook_ptr, LOOKUP), 16, WARPS)
        sums0 = tl.dot(weight0, columns, sums0)
        weight1 = operand(decoded(four1[i].reshape(PLACES, 1), table, codebook_ptr, LOOKUP), 16, WARPS)
        sums1 = tl.dot(weight1, columns, sums1)
    factors = _of_places(absmax[0], absmax[1])
    # Row 0 of four, as many times as there are places.
    row = tl.arange(0, PLACES) * 0
    total0 = tl.fma(sums0, _factors(factors, row, WARPS), totals[0])
    total1 = tl.fma(sums1, _factors(factors, row + 2, WARPS), totals[1])
    return total0, total1


@triton.jit
def joined(totals: tl.tuple, WARPS: tl.constexpr) -> tl.tensor:
    """[WARPS, 16, 2]: of both of `totals`, the sums of all blocks for each row of W and of x."""
    # rows of the pair, fours of rows, halves; rows of x, halves, blocks of the pair; pairs
    both = tl.join(totals[0], totals[1]).reshape(WARPS, 2, 4, 2, 2, 2, 2, 2)
    half = tl.arange(0, 2)
    is_own = half[:, None] == half[None, :]
    both = tl.where(is_own[None, None, None, :, None, :, None, None], both, 0.0)
    sums = tl.sum(tl.sum(tl.sum(both, axis=6), axis=5), axis=3)
    return sums.permute(0, 2, 4, 1, 3).reshape(WARPS, 16, 2)
