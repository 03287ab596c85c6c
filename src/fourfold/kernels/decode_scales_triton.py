"""The scales of a warp's rows in `decode_spread_triton`: a lane decodes those of one row and of its half of each span.

Where it can be, all are asked for at the beginning, and kept as they are: those of four spans in one number of 64 bits,
the next ones lowest. A warp's part of a row lies in two blocks of scales at most: of both, a lane has the number to
decode with from the beginning. So a span asks memory for nothing but its codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.decode_lookup_triton import decoded_scale

__all__ = ["absmax_of", "four_words", "load_scale_words", "load_scales", "pack"]


@triton.jit
def four_words(words: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Four times [lanes] of words [lanes, 4]."""
    even, odd = tl.split(words.reshape(words.shape[0], 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def load_scale_words(
    lanes: tl.tuple, known: tl.tensor, COLUMNS: tl.constexpr, NESTED_SHIFT: tl.constexpr, SPANS: tl.constexpr
) -> tuple[tl.tuple, tl.tuple]:
    """[lanes] of each span's scales, as `pack` takes them; and of what they are decoded with: the number of the first
    block of scales, that of the second, and from which block of the row on that is.

    Args:
        lanes: See `of_rows`.
        known: Zeros [lanes], before which nothing is asked for.
    """
    scales_ptr, nested_ptr, _, row_start, q, _, first = lanes
    BLOCKS: tl.constexpr = COLUMNS // 64
    # Spans whose scales a lane loads at once.
    WIDTH: tl.constexpr = 4 if SPANS % 4 == 0 and BLOCKS % 16 == 0 else 2 if SPANS % 2 == 0 and BLOCKS % 8 == 0 else 1
    own_row = (row_start + known) // 64 + q * BLOCKS
    words: tl.tuple = ()
    for start in tl.static_range(0, SPANS, WIDTH):
        # Behind the row lies nothing of it, but something.
        begin = own_row + tl.minimum(first + start * 4, BLOCKS - 4 * WIDTH)
        # Rounded to what it is a multiple of anyway, so that Triton knows it and loads as much at once.
        at = scales_ptr + begin // (4 * WIDTH) * (4 * WIDTH)
        at = tl.multiple_of(at, 4 * WIDTH).to(tl.pointer_type(tl.int32))
        if WIDTH == 1:
            words = words + (tl.load(at),)  # noqa: RUF005, no starred tuples
        elif WIDTH == 2:
            words = words + tl.split(tl.load(at[:, None] + tl.arange(0, 2)[None, :]))
        else:
            words = words + four_words(tl.load(at[:, None] + tl.arange(0, 4)[None, :]))
    begin = own_row + tl.minimum(first, BLOCKS - 1)
    nested0 = tl.load(nested_ptr + (begin >> NESTED_SHIFT))
    nested1 = nested0
    if (1 << NESTED_SHIFT) % BLOCKS != 0:
        end = own_row + tl.minimum(first + SPANS * 4, BLOCKS)
        nested1 = tl.load(nested_ptr + ((end - 1) >> NESTED_SHIFT))
    change = (((begin >> NESTED_SHIFT) + 1) << NESTED_SHIFT) - own_row
    return words, (nested0, nested1, change)


@triton.jit
def pack(words: tl.tuple, lanes: tl.tuple, SPANS: tl.constexpr) -> tl.tuple:
    """Four times [lanes]: of `words` of scales those of a lane's half."""
    _, _, _, _, _, r, _ = lanes
    packed: tl.tuple = ()
    for span in tl.static_range(0, 16, 4):
        four = (r * 0).to(tl.uint64)
        for i in tl.static_range(4):
            if span + i < SPANS:
                own = (words[span + i] >> (r % 2 * 16)) & 0xFFFF
                four = four | (own.to(tl.uint64) << (i * 16))
        packed = packed + (four,)  # noqa: RUF005
    return packed


@triton.jit
def _packed_absmax(
    packed: tl.tensor,
    step: tl.constexpr,
    decoding: tl.tuple,
    lanes: tl.tuple,
    span: tl.tensor,
    map_at: tl.tensor,
    code_map_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tuple:
    """Twice [lanes]: absmax of a lane's two blocks of `span`, whose scales are the pair `step` of `packed`; 0 behind
    the row."""
    _, _, offset, _, _, r, first = lanes
    nested0, nested1, change = decoding
    BLOCKS: tl.constexpr = COLUMNS // 64
    block = first + span * 4 + r % 2 * 2
    low = (packed >> (step // 2 * 32)).to(tl.int32)
    both: tl.tuple = ()
    for second in tl.static_range(2):
        code = (low >> (step % 2 * 16 + second * 8)) & 0xFF
        nested_absmax = nested0
        if (1 << NESTED_SHIFT) % BLOCKS != 0:
            nested_absmax = tl.where(block + second < change, nested0, nested1)
        # Two roundings: fused multiply-adds must be off.
        absmax = decoded_scale(code, map_at, code_map_ptr, LOOKUP) * nested_absmax + offset
        if CHECKED:
            absmax = tl.where(block + second < BLOCKS, absmax, 0.0)
        both = both + (absmax,)  # noqa: RUF005
    return both


@triton.jit
def load_scales(
    lanes: tl.tuple, span: tl.tensor, code_map_ptr: tl.tensor, COLUMNS: tl.constexpr, NESTED_SHIFT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The scales of a lane's two blocks of `span`, and what each is decoded with, where they are not packed."""
    scales_ptr, nested_ptr, offset, row_start, q, r, first = lanes
    LAST: tl.constexpr = COLUMNS // 64 - 1
    own_row = row_start // 64 + q * (COLUMNS // 64)
    block = first + span * 4 + r % 2 * 2
    at0, at1 = own_row + tl.minimum(block, LAST), own_row + tl.minimum(block + 1, LAST)
    nested0, nested1 = offset, offset
    if code_map_ptr is not None:
        nested0, nested1 = tl.load(nested_ptr + (at0 >> NESTED_SHIFT)), tl.load(nested_ptr + (at1 >> NESTED_SHIFT))
    return tl.load(scales_ptr + at0), tl.load(scales_ptr + at1), nested0, nested1


@triton.jit
def _plain_absmax(
    scales: tl.tuple,
    lanes: tl.tuple,
    span: tl.tensor,
    code_map_ptr: tl.tensor,
    COLUMNS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """As `_packed_absmax`, from what `load_scales` has."""
    _, _, offset, _, _, r, first = lanes
    scale0, scale1, nested0, nested1 = scales
    block = first + span * 4 + r % 2 * 2
    if code_map_ptr is not None:
        scale0 = tl.load(code_map_ptr + scale0.to(tl.int32)) * nested0 + offset
        scale1 = tl.load(code_map_ptr + scale1.to(tl.int32)) * nested1 + offset
    if CHECKED:
        scale0 = tl.where(block < COLUMNS // 64, scale0, 0.0)
        scale1 = tl.where(block + 1 < COLUMNS // 64, scale1, 0.0)
    return scale0, scale1


@triton.jit
def absmax_of(
    scales: tl.tuple,
    step: tl.constexpr,
    decoding: tl.tuple,
    lanes: tl.tuple,
    span: tl.tensor,
    map_at: tl.tensor,
    code_map_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    PACKED: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tuple:
    """Twice [lanes]: absmax of a lane's two blocks of `span`; 0 behind the row.

    Args:
        scales: Of that span, as `load_scales` has them; or PACKED, as `pack` has them, the span's as pair `step` of the
            first.
    """
    if PACKED:
        absmax = _packed_absmax(
            *(scales[0], step, decoding, lanes, span, map_at, code_map_ptr, LOOKUP, COLUMNS, NESTED_SHIFT, CHECKED),
        )
    else:
        absmax = _plain_absmax(scales, lanes, span, code_map_ptr, COLUMNS, CHECKED)
    return absmax
