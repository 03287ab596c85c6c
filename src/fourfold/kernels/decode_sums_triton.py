"""The sums of a warp's spans in `decode_spread_triton`.

Where there are few spans, all is asked for at the beginning. Else a lane asks for all that it needs of a span while it
works on the one before, and not before that one's own has come: see `issued`.

Where rows are many, as many programs as a GPU runs at a time take tiles of rows in turn, so that none of them ends long
before the others, the table is filled once, and x is read once. What a tile's end would need of all warps, their sums,
waits until all tiles are done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.decode_scales_triton import absmax_of, four_words, load_scale_words, load_scales, pack
from fourfold.kernels.decode_span_triton import issued, joined, load_words, load_x, of_rows, sent, with_span

__all__ = ["held_sums", "looped_sums", "sums_of_tiles"]


@triton.jit
def _known(words: tl.tensor, zero: tl.tensor) -> tl.tensor:
    """Zeros [places] that are known once `words` have come. `zero` is 0, of which the compiler does not know it."""
    return four_words(words)[0] & zero


@triton.jit
def _of_lanes(value: tl.tensor) -> tl.tensor:
    """[lanes]: what [places] has of a lane's first place."""
    return tl.split(value.reshape(2, value.shape[0] // 2).permute(1, 0))[0]


@triton.jit
def _as_one(words: tl.tuple, SPANS: tl.constexpr) -> tl.tensor:
    """Once or twice [lanes] of 32 bits as [lanes] of 64."""
    whole = words[0].to(tl.uint32, bitcast=True).to(tl.uint64)
    if SPANS == 2:
        whole = whole | (words[1].to(tl.uint64) << 32)
    return whole


@triton.jit
def _keep(ptr: tl.tensor, value: tl.tensor, LOOKUP: tl.constexpr) -> None:
    """Stores fp32 from the lanes that have it, of which several may have the same: `tl.store` would first hand it to
    others, through shared memory, for which all warps would wait."""
    if LOOKUP == "gather":
        tl.store(ptr, value)
    else:
        tl.inline_asm_elementwise(
            "st.global.f32 [$1], $2; mov.u32 $0, 0;",
            "=r,l,f",
            [ptr.to(tl.int64), value],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def held_sums(
    x_ptr: tl.tensor,
    num_inputs: tl.tensor,
    loaded: tl.tuple,
    absmax: tl.tuple,
    lanes: tl.tuple,
    table: tl.tensor,
    codebook_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """See `joined`: of a warp's spans, of which all words are loaded, and all absmax."""
    zeros = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    totals = (zeros, zeros)
    x = load_x(x_ptr, num_inputs, lanes, 0, COLUMNS, CHECKED)
    for span in tl.static_range(SPANS):
        now = x
        if span + 1 < SPANS:
            x = load_x(x_ptr, num_inputs, lanes, span + 1, COLUMNS, CHECKED)
        totals = with_span(totals, loaded[span], now, absmax[span], table, codebook_ptr, LOOKUP, WARPS)
    return joined(totals, WARPS)


@triton.jit
def looped_sums(
    x_ptr: tl.tensor,
    num_inputs: tl.tensor,
    words: tl.tuple,
    scales: tl.tuple,
    decoding: tl.tuple,
    of_words: tl.tuple,
    lanes: tl.tuple,
    zero: tl.tensor,
    table: tl.tensor,
    map_at: tl.tensor,
    codebook_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    PACKED: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """See `joined`: of a warp's spans, of which the words of the first are loaded; and all scales, where they are
    packed, else those of the first."""
    t0 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    t1 = tl.full([WARPS, 16, 8], 0.0, tl.float32)
    # A loop keeps tensors, no tuples.
    w0, w1 = words
    s0, s1, s2, s3 = scales
    x0, x1, x2, x3 = load_x(x_ptr, num_inputs, lanes, 0, COLUMNS, CHECKED)
    for span in range(SPANS - 1):
        now, now_x, now_scales = (w0, w1), (x0, x1, x2, x3), (s0, s1, s2, s3)
        w0, w1 = load_words(of_words, _known(w0, zero), span + 1, True, COLUMNS, CHECKED)
        if PACKED:
            s0, s1, s2, s3 = (s0 >> 16) | (s1 << 48), (s1 >> 16) | (s2 << 48), (s2 >> 16) | (s3 << 48), s3 >> 16
        else:
            s0, s1, s2, s3 = load_scales(lanes, span + 1, code_map_ptr, COLUMNS, NESTED_SHIFT)
        x0, x1, x2, x3 = load_x(x_ptr, num_inputs, lanes, span + 1, COLUMNS, CHECKED)
        sent(LOOKUP)
        absmax = absmax_of(
            *(now_scales, 0, decoding, lanes, span, map_at, code_map_ptr),
            *(LOOKUP, COLUMNS, NESTED_SHIFT, PACKED, CHECKED),
        )
        t0, t1 = with_span((t0, t1), now, now_x, absmax, table, codebook_ptr, LOOKUP, WARPS)
    absmax = absmax_of(
        *((s0, s1, s2, s3), 0, decoding, lanes, SPANS - 1, map_at, code_map_ptr),
        *(LOOKUP, COLUMNS, NESTED_SHIFT, PACKED, CHECKED),
    )
    t0, t1 = with_span((t0, t1), (w0, w1), (x0, x1, x2, x3), absmax, table, codebook_ptr, LOOKUP, WARPS)
    return joined((t0, t1), WARPS)


@triton.jit
def sums_of_tiles(
    partial_ptr: tl.tensor,
    x_ptr: tl.tensor,
    num_inputs: tl.tensor,
    words: tl.tuple,
    scales: tl.tuple,
    decoding: tl.tuple,
    of_words: tl.tuple,
    lanes: tl.tuple,
    first_row: tl.tensor,
    members: tl.tuple,
    rows: tl.tuple,
    zero: tl.tensor,
    table: tl.tensor,
    map_at: tl.tensor,
    codebook_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    LOOKUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    WARPS: tl.constexpr,
    SPANS: tl.constexpr,
    TILES: tl.constexpr,
    HELD_TILES: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHECKED: tl.constexpr,
) -> tl.tensor:
    """[WARPS, 16 * HELD_TILES, 2]: see `joined`, of one tile of rows after the other, and of a warp's one span or two.
    The words of the first span are loaded, and the scales of the first tile.

    All that a lane needs is asked for while it works on the span before, from tile to tile; the sums of a tile wait in
    `partial` until all are there.

    Args:
        HELD_TILES: A power of two from TILES on, behind which sums are zeros.
    """
    at = tl.arange(0, WARPS)[:, None, None] * 32 + tl.arange(0, 16)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    at += tl.program_id(0) * (TILES * WARPS * 32)
    # A loop keeps tensors, no tuples.
    w0, w1 = words
    raw = _as_one(scales, SPANS)
    nested0, nested1, change = decoding
    words_ptr, row_start, q, half, second, first = of_words
    _, _, offset, _, lane_q, lane_r, lane_first = lanes
    x: tl.tuple = ()
    for span in tl.static_range(SPANS):
        x = x + (load_x(x_ptr, num_inputs, lanes, span, COLUMNS, CHECKED),)  # noqa: RUF005, no starred tuples
    for tile in range(TILES):
        next_row = first_row + tl.minimum(tile + 1, TILES - 1) * OUT_ROWS
        next_words, next_lanes = of_rows(next_row, members, rows, COLUMNS, SPANS, 1, OUT_ROWS, ACTIVATION, WARPS)
        zeros = tl.full([WARPS, 16, 8], 0.0, tl.float32)
        totals = (zeros, zeros)
        own_words = (words_ptr, row_start, q, half, second, first)
        own_lanes = (0, 0, offset, 0, lane_q, lane_r, lane_first)
        own_decoding = (nested0, nested1, change)
        for span in tl.static_range(SPANS):
            now = (w0, w1)
            if span > 0:
                issued(zero, span * 2 + 1, LOOKUP)
            known = _known(w0, zero)
            if span == 0:
                packed = pack((raw.to(tl.int32), (raw >> 32).to(tl.int32)), own_lanes, SPANS)
            if span + 1 < SPANS:
                w0, w1 = load_words(own_words, known, span + 1, True, COLUMNS, CHECKED)
            else:
                w0, w1 = load_words(next_words, known, 0, tile + 1 < TILES, COLUMNS, CHECKED)
                next_scales, next_decoding = load_scale_words(
                    *(next_lanes, _of_lanes(known), COLUMNS, NESTED_SHIFT, SPANS)
                )
                nested0, nested1, change = next_decoding
                raw = _as_one(next_scales, SPANS)
                words_ptr = next_words[0]
                row_start = next_words[1]
                offset = next_lanes[2]
            issued(zero, span * 2 + 2, LOOKUP)
            absmax = absmax_of(
                *(packed, span, own_decoding, own_lanes, span, map_at, code_map_ptr),
                *(LOOKUP, COLUMNS, NESTED_SHIFT, True, CHECKED),
            )
            totals = with_span(totals, now, x[span], absmax, table, codebook_ptr, LOOKUP, WARPS)
        _keep(partial_ptr + (at + tile * (WARPS * 32)), joined(totals, WARPS), LOOKUP)
    tl.debug_barrier()
    row = tl.arange(0, 16 * HELD_TILES)[None, :, None]
    at = tl.arange(0, WARPS)[:, None, None] * 32 + row % 16 * 2 + tl.arange(0, 2)[None, None, :]
    at += (tl.program_id(0) * TILES + row // 16) * (WARPS * 32)
    # Another lane has written it: not from the L1 cache, where an older one may be.
    return tl.load(partial_ptr + at, mask=row // 16 < TILES, other=0.0, cache_modifier=".cg")
