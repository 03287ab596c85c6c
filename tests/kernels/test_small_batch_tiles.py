"""How the product of few rows is shared out: the tiles that were measured best, and every column once."""

from __future__ import annotations

import pytest

from fourfold.kernels.small_batch_tiles import TILES, configuration

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (6144, 4096)]


# The indices of the tiles, and the programs that share the columns, for each of SHAPES.
@pytest.mark.parametrize(
    ("inputs", "tiles", "splits"),
    [
        ((1, 8), (0, 1, 1, 1), (1, 1, 1, 1)),
        ((9, 16), (2, 3, 3, 3), (1, 2, 2, 2)),
        ((17, 32), (4, 5, 5, 5), (1, 8, 8, 8)),
        ((33, 64), (6, 6, 6, 6), (2, 8, 8, 4)),
    ],
)
def test_the_shapes_of_an_8b_model_are_shared_out_as_was_measured_best(
    inputs: tuple[int, ...], tiles: tuple[int, ...], splits: tuple[int, ...]
) -> None:
    for num_inputs in inputs:
        chosen = [configuration(num_inputs, *shape, 64) for shape in SHAPES]
        assert [TILES.index(one.tile) for one in chosen] == list(tiles)
        assert [one.splits for one in chosen] == list(splits)


@pytest.mark.parametrize("columns", [64, 320, 576, 896, 2048, 3584, 8960, 11008, 14336, 28672])
@pytest.mark.parametrize("block_size", [64, 128, 4096])
def test_every_column_has_one_share_and_no_program_is_without_columns(columns: int, block_size: int) -> None:
    for num_inputs in range(1, 65, 9):
        for num_rows in (1, 72, 1024, 8448, 128256):
            tile, splits, steps, is_quad = configuration(num_inputs, num_rows, columns, block_size)
            share = tile.column_warps * steps * 32 * tile.words
            assert num_inputs <= tile.block_m
            assert (splits - 1) * share < columns <= splits * share
            assert is_quad == (block_size <= 128 and columns % block_size == 0)
            if is_quad:
                assert steps * 32 * tile.words % (4 * block_size) == 0
