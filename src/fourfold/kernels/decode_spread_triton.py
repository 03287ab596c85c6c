"""One or two rows of x in `decode_linear`: the columns of the tensor cores' result tell blocks apart, not rows of x.

The tensor cores multiply W with eight columns at least, of which one row of x would use one. Here column n has row
n // 4 of x where a lane's codes are of a span's block n % 4, and zeros elsewhere. So the sums of a span's four blocks
come out beside each other, and lanes that share a row of W need not go through the same block: each reads sixteen bytes
at once, in half as many requests to the L1 cache, which is what bounds the product.

A warp counts its loads by six scoreboards, and waits for all that one of them counts: the compiler mixes what comes
from far with what is near. So all that a lane needs for a span is asked for while it works on the span before, and not
before that one's own has come.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.decode_lookup_triton import decoded
from fourfold.kernels.small_batch_parts_triton import from_quad
from fourfold.kernels.small_batch_triton import operand

__all__ = ["load_weights", "spread_sums"]


@triton.jit
def load_weights(
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    row_start: tl.tensor,
    q: tl.tensor,
    block: tl.tensor,
    is_there: tl.tensor,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    IS_NESTED: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """What a lane reads of its row of W over a span: words of codes [places, 4] of either half, of which lanes 0 and 1
    have the first block and 2 and 3 the second; the scale of block q [places], and what that is decoded with.

    Args:
        row_start: First element of the row.
        block: First of the span.
        is_there: Whether there is such a span; else zeros.
        CHECKED: Whether blocks may lie behind the row.
    """
    BLOCKS: tl.constexpr = COLUMNS // 64
    # Rounded to what it is a multiple of anyway, so that Triton knows it and loads sixteen bytes at once.
    at = (words_ptr + (row_start // 32 * 4 + block * 8 + q * 4))[:, None] + tl.arange(0, 4)[None, :]
    is_near = tl.full(q.shape, 1, tl.int1) & is_there
    is_far = is_near
    if CHECKED:
        is_near = is_near & (block + q // 2 < BLOCKS)
        is_far = is_far & (block + q // 2 + 2 < BLOCKS)
    near = tl.load(at, mask=is_near[:, None], other=0, eviction_policy="evict_first")
    far = tl.load(at + 16, mask=is_far[:, None], other=0, eviction_policy="evict_first")
    own = row_start // 64 + tl.minimum(block + q, BLOCKS - 1)
    scale = tl.load(scales_ptr + own)
    nested_absmax = row_start.to(tl.float32)
    if IS_NESTED:
        nested_absmax = tl.load(nested_ptr + (own >> NESTED_SHIFT))
    return near, far, scale, nested_absmax


@triton.jit
def _load_x(
    x_ptr: tl.tensor,
    x_row: tl.tensor,
    has_x: tl.tensor,
    q: tl.tensor,
    half: tl.tensor,
    block: tl.tensor,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four times [places of x, 8] that go with the words of `load_weights`, of the half that a place's column is for.

    Args:
        x_row: First element of a place's row of x.
        has_x: Whether the place's lane and column go together.
        half: 0 or 1, per place.
        block: First of the span.
    """
    first = block + half * 2
    if CHECKED:
        has_x = has_x & (first + q // 2 < COLUMNS // 64)
    at = (x_ptr + (x_row + first * 64 + q * 32) // 32 * 32)[:, None] + tl.arange(0, 8)[None, :]
    x0 = tl.load(at, mask=has_x[:, None], other=0.0)
    x1 = tl.load(at + 8, mask=has_x[:, None], other=0.0)
    x2 = tl.load(at + 16, mask=has_x[:, None], other=0.0)
    x3 = tl.load(at + 24, mask=has_x[:, None], other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _known_once(words: tl.tensor, zero: tl.tensor, PLACES: tl.constexpr) -> tl.tensor:
    """Zeros [places] that are known once `words` have come. `zero` is 0, of which the compiler does not know it."""
    even, _ = tl.split(words.reshape(PLACES, 2, 2))
    word, _ = tl.split(even)
    return word & zero


@triton.jit
def _issued() -> None:
    """The loads before this are on their way before what follows: ptxas would put them off to where they are needed."""
    tl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _span_total(
    total: tl.tensor,
    near: tl.tensor,
    far: tl.tensor,
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    absmax: tl.tensor,
    q: tl.tensor,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
) -> tl.tensor:
    """`total` [WARPS, rows of W, 8] and what a span adds.

    absmax: [places], that of block q.
    """
    PLACES: tl.constexpr = 4 * ROWS * WARPS
    # Columns that belong to the other half get what nobody wants.
    near_sums = tl.full(total.shape, 0.0, tl.float32)
    far_sums = tl.full(total.shape, 0.0, tl.float32)
    near_even, near_odd = tl.split(near.reshape(PLACES, 2, 2))
    far_even, far_odd = tl.split(far.reshape(PLACES, 2, 2))
    near0, near2 = tl.split(near_even)
    near1, near3 = tl.split(near_odd)
    far0, far2 = tl.split(far_even)
    far1, far3 = tl.split(far_odd)
    for i in tl.static_range(4):
        near_word = near0 if i == 0 else near1 if i == 1 else near2 if i == 2 else near3
        far_word = far0 if i == 0 else far1 if i == 1 else far2 if i == 2 else far3
        x = x0 if i == 0 else x1 if i == 1 else x2 if i == 2 else x3
        columns = operand(x, 8, WARPS).permute(0, 2, 1)
        near_weight = operand(decoded(near_word.reshape(PLACES, 1), table, codebook_ptr, LOOKUP), ROWS, WARPS)
        near_sums = tl.dot(near_weight, columns, near_sums)
        far_weight = operand(decoded(far_word.reshape(PLACES, 1), table, codebook_ptr, LOOKUP), ROWS, WARPS)
        far_sums = tl.dot(far_weight, columns, far_sums)
    # A lane has the sums of two blocks.
    pair = tl.join(from_quad(absmax, q * 2 % 4, PLACES), from_quad(absmax, (q * 2 + 1) % 4, PLACES))
    factor = pair.reshape(ROWS // 8, WARPS, 8, 1, 4, 2).permute(1, 0, 2, 3, 4, 5).reshape(WARPS, ROWS, 8)
    is_near = (tl.arange(0, 8) % 4 < 2)[None, None, :]
    return tl.fma(tl.where(is_near, near_sums, far_sums), factor, total)


@triton.jit
def _step(
    total: tl.tensor,
    near: tl.tensor,
    far: tl.tensor,
    scale: tl.tensor,
    nested_absmax: tl.tensor,
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    offset: tl.tensor,
    row_start: tl.tensor,
    q: tl.tensor,
    block: tl.tensor,
    is_more: tl.tensor,
    x_ptr: tl.tensor,
    x_row: tl.tensor,
    has_x: tl.tensor,
    x_q: tl.tensor,
    half: tl.tensor,
    x_block: tl.tensor,
    zero: tl.tensor,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """`total` with a span added, and what `load_weights` and `_load_x` load of the next, if there is one."""
    BLOCKS: tl.constexpr = COLUMNS // 64
    start = row_start + _known_once(near, zero, 4 * ROWS * WARPS)
    next_near, next_far, next_scale, next_nested = load_weights(
        *(words_ptr, scales_ptr, nested_ptr, start, q, block + 4, is_more),
        *(COLUMNS, NESTED_SHIFT, code_map_ptr is not None, CHECKED),
    )
    next_x = tl.minimum(x_block + 4, (BLOCKS - 1) // 4 * 4)
    next_x0, next_x1, next_x2, next_x3 = _load_x(x_ptr, x_row, has_x, x_q, half, next_x, COLUMNS, CHECKED)
    if LOOKUP != "gather":
        _issued()
    absmax = scale
    if code_map_ptr is not None:
        # Two roundings: fused multiply-adds must be off.
        absmax = tl.load(code_map_ptr + scale.to(tl.int32)) * nested_absmax + offset
    if CHECKED:
        absmax = tl.where(block + q < BLOCKS, absmax, 0.0)
    total = _span_total(total, near, far, x0, x1, x2, x3, absmax, q, table, codebook_ptr, LOOKUP, ROWS, WARPS)
    return total, next_near, next_far, next_scale, next_nested, next_x0, next_x1, next_x2, next_x3


@triton.jit
def spread_sums(
    near: tl.tensor,
    far: tl.tensor,
    scale: tl.tensor,
    nested_absmax: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    nested_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    offset: tl.tensor,
    row_start: tl.tensor,
    q: tl.tensor,
    first: tl.tensor,
    x_ptr: tl.tensor,
    x_q: tl.tensor,
    x_r: tl.tensor,
    x_first: tl.tensor,
    num_inputs: tl.tensor,
    zero: tl.tensor,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """[WARPS, rows of W, 8]: in column n the sum of row n // 4 of x over all spans' blocks n % 4, times their scales.

    Args:
        near, far, scale, nested_absmax: What `load_weights` has of the first span.
        code_map_ptr: None where scales are fp32, and as they are.
        offset: Of nested scales [places].
        first, x_first: First block of a warp, for the places of W and of x.
        x_q, x_r: See `places`.
        zero: 0, of which the compiler does not know it.
    """
    m = x_r // 4
    half = x_r % 4 // 2
    has_x = (m < num_inputs) & (x_r % 2 == x_q // 2)
    x_row = tl.minimum(m, num_inputs - 1) * COLUMNS
    total = tl.full([WARPS, ROWS, 8], 0.0, tl.float32)
    x0, x1, x2, x3 = _load_x(x_ptr, x_row, has_x, x_q, half, x_first, COLUMNS, CHECKED)
    # Two spans a turn, so that nothing is copied from one register to another.
    for turn in range(SPANS // 2):
        block, x_block = first + turn * 8, x_first + turn * 8
        total, near1, far1, scale1, nested1, x4, x5, x6, x7 = _step(
            *(total, near, far, scale, nested_absmax, x0, x1, x2, x3, words_ptr, scales_ptr, nested_ptr),
            *(code_map_ptr, offset, row_start, q, block, SPANS > 1, x_ptr, x_row, has_x, x_q, half, x_block),
            *(zero, table, codebook_ptr),
            *(LOOKUP, COLUMNS, NESTED_SHIFT, ROWS, WARPS, CHECKED),
        )
        total, near, far, scale, nested_absmax, x0, x1, x2, x3 = _step(
            *(total, near1, far1, scale1, nested1, x4, x5, x6, x7, words_ptr, scales_ptr, nested_ptr),
            *(code_map_ptr, offset, row_start, q, block + 4, turn * 2 + 2 < SPANS, x_ptr, x_row, has_x, x_q, half),
            *(x_block + 4, zero, table, codebook_ptr),
            *(LOOKUP, COLUMNS, NESTED_SHIFT, ROWS, WARPS, CHECKED),
        )
    if SPANS % 2 == 1:
        total, near, far, scale, nested_absmax, x0, x1, x2, x3 = _step(
            *(total, near, far, scale, nested_absmax, x0, x1, x2, x3, words_ptr, scales_ptr, nested_ptr),
            *(code_map_ptr, offset, row_start, q, first + (SPANS - 1) * 4, SPANS == 0, x_ptr, x_row, has_x, x_q),
            *(half, x_first + (SPANS - 1) * 4, zero, table, codebook_ptr),
            *(LOOKUP, COLUMNS, NESTED_SHIFT, ROWS, WARPS, CHECKED),
        )
    return total
