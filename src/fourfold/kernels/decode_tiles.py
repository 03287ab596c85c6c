"""What a program of `decode_linear_triton` takes, by the shapes of x and W."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fourfold.kernels.launching import cdiv

__all__ = ["MAX_PACKED_SPANS", "MAX_TILES", "SPREAD_ROWS", "Tile", "packs", "spreads", "tile_for"]

# Of x, up to which `decode_spread_triton` multiplies.
SPREAD_ROWS = 2
# That a program takes in turn: it needs registers for the sums of all.
MAX_TILES = 16
# Whose scales `decode_scales_triton` keeps.
MAX_PACKED_SPANS = 16


class Tile(NamedTuple):
    """What a program takes.

    Args:
        block_m: Rows of x.
        rows: Of W, to a warp; where gate and up are multiplied, half are gate's.
        row_warps, column_warps: That share out rows of W, and the columns; 4 or 8 in all.
        registers: That a thread may have; None for as many as the compiler likes.
        tiles: Times as many rows of W, one after the other; more than one only for rows of x that spread, with one row
            warp, and up to 512 columns to a warp.
    """

    block_m: int
    rows: int
    row_warps: int
    column_warps: int
    registers: int | None = None
    tiles: int = 1


def tile_for(num_inputs: int, num_rows: int, num_columns: int, processors: int, *, packed: bool = False) -> Tile:
    """Measured on an H200, in the shapes of Llama-3-8B: `benchmarks/kernels/decode.py --tiles`.

    Warps that share columns have sums to add up; without them, few rows would give a GPU too few warps.

    Args:
        num_inputs, num_rows, num_columns: Of x, and of W: all members' rows.
        processors: Multiprocessors of the GPU.
        packed: Whether `decode_scales_triton` would keep the scales of a warp that takes few spans.
    """
    is_long, has_many = num_columns > 8192, num_rows >= 128 * processors
    # Where a program of eight warps to each multiprocessor is all that there are.
    is_all = num_rows <= 32 * processors
    if num_inputs <= SPREAD_ROWS:
        # Warps that go through more columns have the words of a few alone, and a fourth program fits a multiprocessor.
        # Eight warps with at most two spans each, nearly all of which have columns.
        is_wide = num_columns <= 4096 and 8 * num_columns >= 7 * 2048 * cdiv(num_columns, 2048)
        if has_many and packed and is_wide:
            # Two programs to a multiprocessor, to which all rows are shared out: with several programs one after the
            # other, the last ones would leave the GPU half empty (18.0 us instead of 21.5 for gate and up).
            turns = cdiv(num_rows, 32 * processors)
            return Tile(8, 16, 1, 8, 128, cdiv(turns, cdiv(turns, MAX_TILES)))
        if has_many:
            return Tile(8, 16, 2, 2, 128 if num_columns > 2048 else None)
        return Tile(8, 16, 1, 8, 128) if is_long or is_all else Tile(8, 16, 1, 4)
    if num_inputs <= 8:
        if has_many:
            return Tile(8, 16, 2, 2)
        return Tile(8, 16, 1, 8, 96) if is_long else Tile(8, 16, 1, 4)
    block_m = 16 if num_inputs <= 16 else 32
    if has_many:
        return Tile(block_m, 32, 4, 1)
    # Those eight warps share what they read of x.
    if num_inputs <= 32 and is_all:
        return Tile(block_m, 16, 2, 4, 160 if is_long else None)
    return Tile(block_m, 32 if is_long else 16, 1, 4)


def spreads(num_inputs: int, num_rows: Sequence[int], num_columns: int) -> bool:
    """Whether `decode_spread_triton` multiplies so many rows of x by members with so many rows of W: it takes four of
    these at a time, and two blocks."""
    return num_inputs <= SPREAD_ROWS and num_columns % 128 == 0 and all(rows % 4 == 0 for rows in num_rows)


def packs(num_columns: int, spans: int, nested_block_size: int) -> bool:
    """Whether `decode_scales_triton` keeps the scales of a warp that takes so many spans: four of these at a time, of
    two blocks of scales at most."""
    return num_columns % 256 == 0 and spans <= MAX_PACKED_SPANS and 4 * spans <= nested_block_size
