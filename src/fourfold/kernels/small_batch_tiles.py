"""How the product of `small_batch_triton` is shared out among warps and programs."""

from __future__ import annotations

import functools
from typing import NamedTuple

from fourfold.kernels.launching import cdiv

__all__ = ["TILES", "Configuration", "Tile", "configuration"]


class Tile(NamedTuple):
    """How a product of up to `block_m` rows of x is shared out.

    A warp takes `block_n` rows of W, of each of them `words` words of codes a lane at once. A program has `row_warps`
    warps for further rows, which read the same columns of x, through their L1 cache, times `column_warps` that share
    the columns. `warps_wanted` fill a large GPU: fixed rather than asked of the GPU, so that the order of the sums, and
    the result, is always the same.
    """

    block_m: int
    block_n: int
    row_warps: int
    column_warps: int
    words: int
    warps_wanted: int

    @property
    def is_packed(self) -> bool:
        """Whether the kernel wants x in the order of the lanes: one launch more, which few rows are not worth."""
        return self.block_m > 8

    def warps(self, num_rows: int) -> int:
        """All warps of one launch, while programs do not share columns."""
        return cdiv(num_rows, self.block_n * self.row_warps) * self.row_warps * self.column_warps


# Of the tiles with enough rows of x, the first that fills the GPU without a second launch, or the last, with columns
# shared among programs. More rows of W that meet the same x spare the L2 cache, which x is read from; fewer leave
# registers to more warps.
TILES = (
    Tile(block_m=8, block_n=16, row_warps=1, column_warps=4, words=4, warps_wanted=2112),
    Tile(block_m=8, block_n=16, row_warps=1, column_warps=8, words=4, warps_wanted=2048),
    Tile(block_m=16, block_n=32, row_warps=1, column_warps=4, words=4, warps_wanted=1056),
    Tile(block_m=16, block_n=16, row_warps=2, column_warps=4, words=4, warps_wanted=2048),
    Tile(block_m=32, block_n=32, row_warps=2, column_warps=4, words=2, warps_wanted=1056),
    Tile(block_m=32, block_n=32, row_warps=4, column_warps=1, words=4, warps_wanted=1024),
    Tile(block_m=64, block_n=32, row_warps=2, column_warps=1, words=2, warps_wanted=768),
)


def choose_tile(num_inputs: int, num_rows: int) -> Tile:
    """The tile for a product of this size."""
    block_m = min(tile.block_m for tile in TILES if num_inputs <= tile.block_m)
    tiles = [tile for tile in TILES if tile.block_m == block_m]
    return next((tile for tile in tiles if tile.warps(num_rows) >= tile.warps_wanted), tiles[-1])


class Configuration(NamedTuple):
    """A tile, the programs that share a row's columns, the steps of each warp, and whether quads share scales."""

    tile: Tile
    splits: int
    steps: int
    is_quad: bool


@functools.cache
def configuration(
    num_inputs: int, num_rows: int, num_columns: int, block_size: int, tile: Tile | None = None
) -> Configuration:
    """How a product is shared out: fixed by its shape."""
    tile = tile or choose_tile(num_inputs, num_rows)
    # A span of larger blocks would leave columns too few shares.
    is_quad = block_size <= 128 and num_columns % block_size == 0
    span = 4 * block_size if is_quad else 32 * tile.words
    splits = 1
    # A warp of fewer than 512 columns spends its time on beginning and ending.
    while splits * tile.warps(num_rows) < tile.warps_wanted and 1024 * splits * tile.column_warps <= num_columns:
        splits *= 2
    columns = cdiv(num_columns, span * tile.column_warps * splits) * span
    # Rounding up may have left shares without columns.
    return Configuration(tile, cdiv(num_columns, columns * tile.column_warps), columns // (32 * tile.words), is_quad)
