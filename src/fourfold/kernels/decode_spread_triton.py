"""One or two rows of x in `decode_linear`: the columns of the tensor cores' result tell blocks apart, not rows of x.

The tensor cores multiply W with eight columns at least, of which one row of x would use one. Here column n has row
n // 4 of x where a lane's codes are of a span's block n % 4, and zeros elsewhere. So the sums of a span's four blocks
come out beside each other, and lanes that share a row of W need not go through the same block: each reads sixteen bytes
at once. Two quads share four rows of W, of which one has the first two blocks of a span and the other the last two: the
eight lanes read a whole line of the L1 cache at a time, whose requests are what bounds the product.

A warp counts its loads by six scoreboards, and waits for all that one of them counts: the compiler mixes what comes
from far with what is near. So all that a lane needs for a span is asked for while it works on the span before, and not
before that one's own has come. Where there are few spans, all is asked for at the beginning.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.decode_lookup_triton import decoded
from fourfold.kernels.small_batch_parts_triton import from_quad
from fourfold.kernels.small_batch_triton import operand

__all__ = ["HELD_SPANS", "load_spans", "spread_sums"]

# All of which a lane asks for at the beginning; where there are more, it asks for one while it works on another.
HELD_SPANS = tl.constexpr(4)


@triton.jit
def _load_weights(
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    row_start: tl.tensor,
    q: tl.tensor,
    half: tl.tensor,
    second: tl.tensor,
    block: tl.tensor,
    is_there: tl.tensor,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """What a lane reads of a span: of rows `second` and 2 + `second` of four of W the words of codes [places, 4]; of
    row q the scale of block `second` of its half [places], and what that is decoded with [places].

    Args:
        row_start: First element of the first row.
        half: Which half of the span a lane has, of which lanes q of 0 and 1 have the first block.
        second: 0 or 1, a lane's two places.
        block: First of the span.
        is_there: Whether there is such a span; else zeros.
        CHECKED: Whether blocks may lie behind the row.
    """
    BLOCKS: tl.constexpr = COLUMNS // 64
    ROW: tl.constexpr = COLUMNS // 8
    # Rounded to what it is a multiple of anyway, so that Triton knows it and loads sixteen bytes at once.
    word = row_start // 32 * 4 + second * ROW + block * 8 + half * 16 + q * 4
    at = (words_ptr + word)[:, None] + tl.arange(0, 4)[None, :]
    is_inside = tl.full(q.shape, 1, tl.int1) & is_there
    if CHECKED:
        is_inside = is_inside & (block + half * 2 + q // 2 < BLOCKS)
    own_block = tl.minimum(block + half * 2 + second, BLOCKS - 1)
    words0 = tl.load(at, mask=is_inside[:, None], other=0, eviction_policy="evict_first")
    words1 = tl.load(at + 2 * ROW, mask=is_inside[:, None], other=0, eviction_policy="evict_first")
    own_row = row_start // 64 + q * BLOCKS
    scale = tl.load(scales_ptr + (own_row + own_block))
    nested_absmax = row_start.to(tl.float32)
    if IS_NESTED:
        # A row that lies in one block of scales has one number.
        if (1 << NESTED_SHIFT) % BLOCKS == 0:
            nested_absmax = tl.load(nested_ptr + (own_row >> NESTED_SHIFT))
        else:
            nested_absmax = tl.load(nested_ptr + ((own_row + own_block) >> NESTED_SHIFT))
    return words0, words1, scale, nested_absmax


@triton.jit
def _absmax(
    scale: tl.tensor,
    nested_absmax: tl.tensor,
    code_map_ptr: tl.tensor,
    offset: tl.tensor,
    block: tl.tensor,
    BLOCKS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """[places] of a block; 0 where it lies behind the row."""
    absmax = scale
    if code_map_ptr is not None:
        # Two roundings: fused multiply-adds must be off.
        absmax = tl.load(code_map_ptr + scale.to(tl.int32)) * nested_absmax + offset
    if CHECKED:
        absmax = tl.where(block < BLOCKS, absmax, 0.0)
    return absmax


@triton.jit
def _load_x(
    x_ptr: tl.tensor,
    num_inputs: tl.tensor,
    q: tl.tensor,
    r: tl.tensor,
    block: tl.tensor,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four times [lanes, 8] that go with the words of `_load_weights`: of column r of the tensor cores' result, lane
    q's part.

    Args:
        block: First of the span.
    """
    m = r // 4
    half = r % 4 // 2
    has_x = (m < num_inputs) & (r % 2 == q // 2)
    first = block + half * 2
    if CHECKED:
        has_x = has_x & (first < COLUMNS // 64)
    row = tl.minimum(m, num_inputs - 1) * COLUMNS
    at = (x_ptr + (row + first * 64 + q * 32) // 32 * 32)[:, None] + tl.arange(0, 8)[None, :]
    x0 = tl.load(at, mask=has_x[:, None], other=0.0)
    x1 = tl.load(at + 8, mask=has_x[:, None], other=0.0)
    x2 = tl.load(at + 16, mask=has_x[:, None], other=0.0)
    x3 = tl.load(at + 24, mask=has_x[:, None], other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _four_words(words: tl.tensor, PLACES: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four times [places] of words [places, 4]."""
    even, odd = tl.split(words.reshape(PLACES, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _known_once(words: tl.tensor, zero: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """Zeros [places] that are known once `words` have come. `zero` is 0, of which the compiler does not know it."""
    return _four_words(words, 64 * WARPS)[0] & zero


@triton.jit
def _issued() -> None:
    """The loads before this are on their way before what follows: ptxas would put them off to where they are needed."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _factors(absmax: tl.tensor, first: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """[WARPS, 16, 8]: absmax of rows `first` and the next of each four, where their sums are."""
    PLACES: tl.constexpr = 64 * WARPS
    both = tl.join(from_quad(absmax, first, PLACES), from_quad(absmax, first + 1, PLACES))
    # blocks of the pair, warps, r, q, rows of the pair
    return both.reshape(2, WARPS, 8, 4, 2).permute(1, 4, 2, 3, 0).reshape(WARPS, 16, 8)


@triton.jit
def _with_span(
    totals: tl.tuple,
    words0: tl.tensor,
    words1: tl.tensor,
    x: tl.tuple,
    absmax: tl.tensor,
    q: tl.tensor,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    WARPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Both of `totals` and what a span adds: see `spread_sums`."""
    PLACES: tl.constexpr = 64 * WARPS
    # Columns that belong to the other half get what nobody wants.
    sums0 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    sums1 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    four0 = _four_words(words0, PLACES)
    four1 = _four_words(words1, PLACES)
    for i in tl.static_range(4):
        columns = operand(x[i], 8, WARPS).permute(0, 2, 1)
        weight0 = operand(decoded(four0[i].reshape(PLACES, 1), table, codebook_ptr, LOOKUP), 16, WARPS)
        sums0 = tl.dot(weight0, columns, sums0)
        weight1 = operand(decoded(four1[i].reshape(PLACES, 1), table, codebook_ptr, LOOKUP), 16, WARPS)
        sums1 = tl.dot(weight1, columns, sums1)
    total0 = tl.fma(sums0, _factors(absmax, q * 0, WARPS), totals[0])
    total1 = tl.fma(sums1, _factors(absmax, q * 0 + 2, WARPS), totals[1])
    return total0, total1


@triton.jit
def _joined(totals: tl.tuple, WARPS: tl.constexpr) -> tl.tensor:
    """[WARPS, 16, 2]: of both of `totals`, the sums of all blocks for each row of W and of x."""
    # rows of the pair, fours of rows, halves; rows of x, halves, blocks of the pair; pairs
    both = tl.join(totals[0], totals[1]).reshape(WARPS, 2, 4, 2, 2, 2, 2, 2)
    half = tl.arange(0, 2)
    is_own = half[:, None] == half[None, :]
    both = tl.where(is_own[None, None, None, :, None, :, None, None], both, 0.0)
    sums = tl.sum(tl.sum(tl.sum(both, axis=6), axis=5), axis=3)
    return sums.permute(0, 2, 4, 1, 3).reshape(WARPS, 16, 2)


@triton.jit
def load_spans(
    lanes: tl.tuple,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    SPANS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tuple:
    """What `_load_weights` has of the first span, in a tuple; or, where all are held, of each, with absmax as scale.

    Args:
        lanes: Where W lies, and what of it a lane has: words of codes, scales, what nested ones are decoded with, their
            code map (None where scales are fp32, and as they are), offset; then row_start, q, half and second (see
            `_load_weights`) and the first block of a warp [places].
    """
    words_ptr, scales_ptr, nested_ptr, code_map_ptr, offset, row_start, q, half, second, first = lanes
    HELD: tl.constexpr = SPANS <= HELD_SPANS
    loaded: tl.tuple = ()
    for span in tl.static_range(SPANS if HELD else 1):
        own = _load_weights(
            *(words_ptr, scales_ptr, nested_ptr, row_start, q, half, second, first + span * 4, True),
            *(COLUMNS, NESTED_SHIFT, code_map_ptr is not None, CHECKED),
        )
        loaded = loaded + (own,)  # noqa: RUF005, Triton knows no starred tuples
    if HELD:
        if LOOKUP != "gather":
            _issued()
        held: tl.tuple = ()
        for span in tl.static_range(SPANS):
            words0, words1, scale, nested_absmax = loaded[span]
            block = first + span * 4 + half * 2 + second
            absmax = _absmax(scale, nested_absmax, code_map_ptr, offset, block, COLUMNS // 64, CHECKED)
            held = held + ((words0, words1, absmax, nested_absmax),)  # noqa: RUF005
        loaded = held
    return loaded


@triton.jit
def _two_spans(
    totals: tl.tuple,
    loaded: tl.tuple,
    x: tl.tuple,
    lanes: tl.tuple,
    of_x: tl.tuple,
    begin: tl.tensor,
    zero: tl.tensor,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple, tl.tuple]:
    """`totals` with spans `begin` and the next, and what `_load_weights` and `_load_x` load of the one behind them."""
    words_ptr, scales_ptr, nested_ptr, code_map_ptr, offset, row_start, q, half, second, first = lanes
    x_ptr, num_inputs, x_q, x_r, x_first = of_x
    BLOCKS: tl.constexpr = COLUMNS // 64
    IS_ROWS: tl.constexpr = (1 << NESTED_SHIFT) % BLOCKS == 0
    IS_NESTED: tl.constexpr = code_map_ptr is not None
    for step in tl.static_range(2):
        words0, words1, scale, nested_absmax = loaded
        now = x
        span = begin + step
        loaded = _load_weights(
            *(words_ptr, scales_ptr, nested_ptr, row_start + _known_once(words0, zero, WARPS), q, half, second),
            *(first + span * 4 + 4, span + 1 < SPANS, COLUMNS, NESTED_SHIFT, IS_NESTED and not IS_ROWS, CHECKED),
        )
        if IS_ROWS:
            loaded = (loaded[0], loaded[1], loaded[2], nested_absmax)
        next_x = tl.minimum(x_first + span * 4 + 4, (BLOCKS - 1) // 4 * 4)
        x = _load_x(x_ptr, num_inputs, x_q, x_r, next_x, COLUMNS, CHECKED)
        if LOOKUP != "gather":
            _issued()
        block = first + span * 4 + half * 2 + second
        absmax = _absmax(scale, nested_absmax, code_map_ptr, offset, block, BLOCKS, CHECKED)
        totals = _with_span(totals, words0, words1, now, absmax, q, table, codebook_ptr, LOOKUP, WARPS)
    return totals, loaded, x


@triton.jit
def spread_sums(
    loaded: tl.tuple,
    lanes: tl.tuple,
    of_x: tl.tuple,
    zero: tl.tensor,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """[WARPS, 16 rows of W, 2 rows of x]: the sums of a warp's spans.

    On the way there are two times [WARPS, 16, 8], of the first and of the last two of each four rows of W: in rows r
    and r + 8 the sums of lane r's half of all spans; in column n those of row n // 4 of x over blocks n % 4 of a span,
    times their scales, if these are of that half.

    Args:
        loaded: What `load_spans` has.
        lanes: See `load_spans`.
        of_x: x, its rows, and of the places of x q, r (see `places`) and the first block.
        zero: 0, of which the compiler does not know it.
    """
    _, _, _, code_map_ptr, offset, _, q, half, second, first = lanes
    x_ptr, num_inputs, x_q, x_r, x_first = of_x
    BLOCKS: tl.constexpr = COLUMNS // 64
    HELD: tl.constexpr = SPANS <= HELD_SPANS
    LOOPED: tl.constexpr = 0 if HELD else SPANS // 2 * 2
    t0 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    t1 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    x0, x1, x2, x3 = _load_x(x_ptr, num_inputs, x_q, x_r, x_first, COLUMNS, CHECKED)
    if not HELD:
        words0, words1, scale, nested_absmax = loaded[0]
        # Two spans a turn, so that nothing is copied from one register to another. (A loop keeps tensors, no tuples.)
        for turn in range(LOOPED // 2):
            totals, now, x = _two_spans(
                *((t0, t1), (words0, words1, scale, nested_absmax), (x0, x1, x2, x3), lanes, of_x, turn * 2, zero),
                *(table, codebook_ptr, LOOKUP, COLUMNS, NESTED_SHIFT, WARPS, SPANS, CHECKED),
            )
            t0, t1 = totals
            words0, words1, scale, nested_absmax = now
            x0, x1, x2, x3 = x
        absmax = _absmax(
            *(scale, nested_absmax, code_map_ptr, offset, first + LOOPED * 4 + half * 2 + second, BLOCKS, CHECKED)
        )
        loaded = ((words0, words1, absmax, nested_absmax),)
    totals = (t0, t1)
    x = (x0, x1, x2, x3)
    for span in tl.static_range(LOOPED, SPANS):
        words0, words1, absmax, _ = loaded[span - LOOPED]
        now = x
        if span + 1 < SPANS:
            next_x = tl.minimum(x_first + span * 4 + 4, (BLOCKS - 1) // 4 * 4)
            x = _load_x(x_ptr, num_inputs, x_q, x_r, next_x, COLUMNS, CHECKED)
            if LOOKUP != "gather":
                _issued()
        totals = _with_span(totals, words0, words1, now, absmax, q, table, codebook_ptr, LOOKUP, WARPS)
    return _joined(totals, WARPS)
