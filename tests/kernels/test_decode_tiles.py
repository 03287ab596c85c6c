"""Which tiles a decode step's products have."""

from __future__ import annotations

from fourfold.kernels.decode_tiles import Tile, packs, spreads, tile_for


def test_tiles_take_more_rows_of_w_where_these_are_many() -> None:
    assert tile_for(1, 28672, 4096, 132) == Tile(8, 16, 2, 2, 128)
    assert tile_for(8, 28672, 4096, 132) == Tile(8, 16, 2, 2)
    assert tile_for(8, 4096, 4096, 132) == Tile(8, 16, 1, 4)
    assert tile_for(1, 4096, 14336, 132) == Tile(8, 16, 1, 8, 128)
    assert tile_for(1, 4096, 4096, 132) == Tile(8, 16, 1, 8, 128)
    assert tile_for(2, 6144, 4096, 132) == Tile(8, 16, 1, 4)
    assert tile_for(32, 4096, 4096, 132) == Tile(32, 16, 2, 4)
    assert tile_for(32, 6144, 4096, 132) == Tile(32, 16, 1, 4)
    assert tile_for(32, 4096, 14336, 132) == Tile(32, 16, 2, 4, 160)
    assert tile_for(64, 4096, 14336, 132) == Tile(32, 32, 1, 4)
    assert tile_for(64, 28672, 4096, 132) == Tile(32, 32, 4, 1)


def test_a_gpu_gets_two_programs_to_a_multiprocessor_where_rows_are_many_and_scales_are_kept() -> None:
    assert tile_for(1, 28672, 4096, 132, packed=True) == Tile(8, 16, 1, 8, 128, 7)
    # 256 programs have all rows, of 264 that run at a time.
    assert 256 * 7 * 16 == 28672
    assert tile_for(1, 28672, 4096, 132, packed=False).tiles == 1
    # Nor where warps would have no columns, nor with more sums than a program has registers for.
    assert tile_for(1, 28672, 2560, 132, packed=True).tiles == 1
    assert tile_for(1, 57344, 8192, 132, packed=True).tiles == 1
    assert tile_for(1, 128256, 4096, 28, packed=True).tiles == 16
    assert tile_for(1, 6144, 4096, 132, packed=True).tiles == 1
    assert tile_for(3, 28672, 4096, 132, packed=True).tiles == 1


def test_scales_are_kept_of_few_spans_that_lie_in_two_blocks_of_scales() -> None:
    assert packs(14336, 7, 256)
    assert not packs(14336, 17, 256)
    assert not packs(14336, 16, 32)
    assert not packs(896, 1, 256)


def test_columns_tell_blocks_apart_for_few_rows_of_x_where_w_comes_in_fours_of_rows_and_pairs_of_blocks() -> None:
    assert spreads(2, [4096, 1024, 1024], 4096)
    assert spreads(1, [24], 384)
    assert not spreads(3, [4096], 4096)
    assert not spreads(1, [4096, 1022], 4096)
    assert not spreads(1, [4096], 576)
