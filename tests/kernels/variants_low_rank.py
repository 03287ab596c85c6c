"""Launches of the passes that form low-rank products, of gradients and of the attention: Llama-3-8B and 1B."""

from __future__ import annotations

from compiling import Variant

from fourfold.kernels import low_rank_beside_triton as beside
from fourfold.kernels import low_rank_pair_triton as kernels
from fourfold.kernels.launching import Tile


def _layers(tile: kernels.Pass, width: int, begins: tuple[int, ...]) -> tuple[int, int, int]:
    """Column blocks, and those with which the second and third layer begin."""
    blocks = -(-width // tile.block_k)
    second, third = (*(begin // tile.block_k for begin in begins), blocks, blocks)[:2]
    return blocks, second, third


def _pair(tile: kernels.Pass, width: int, rank: int, begins: tuple[int, ...] = (), pointer: str = "*bf16") -> Variant:
    _, second, third = _layers(tile, width, begins)
    arguments = {
        **dict.fromkeys(("wide_ptr", "up_ptr", "low_ptr"), pointer),
        **dict.fromkeys(("products_ptr", "sums_ptr"), "*fp32"),
        **dict.fromkeys(("num_rows", "share_rows", "wide_stride", "up_stride_n", "low_stride"), "i32"),
        **{"up_stride_r": 1, "SHARE": 0, "N": width, "R": rank, "SECOND": second, "THIRD": third},
        "BLOCK_R": max(16, 1 << (rank - 1).bit_length()),
        **{"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return Variant(kernels.low_rank_pair_kernel, arguments, options, unaligned=("num_rows",))


def _sums(tile: kernels.Pass, width: int, rank: int, begins: tuple[int, ...] = ()) -> Variant:
    blocks, second, third = _layers(tile, width, begins)
    arguments = {
        **dict.fromkeys(("products_ptr", "out_ptr", "sums_ptr"), "*fp32"),
        **dict.fromkeys(("num_rows", "extended_stride"), "i32"),
        **dict.fromkeys(("first_scaling", "second_scaling", "third_scaling"), "fp32"),
        **{"extended_ptr": "*bf16", "N": width, "R": rank, "SECOND": second, "THIRD": third},
        **{"COLUMN_BLOCKS": blocks, "SHARES": max(1, tile.programs // blocks), "BLOCK_K": tile.block_k},
        "BLOCK": kernels.SUM_BLOCK,
    }
    return Variant(kernels.sum_pair_kernel, arguments, {"num_warps": 4}, unaligned=("num_rows",))


def _beside(tile: Tile, width: int, rank: int, copy: bool = True, pointer: str = "*bf16") -> Variant:
    arguments = {
        **dict.fromkeys(("x_ptr", "projection_ptr", "out_ptr", "low_ptr"), pointer),
        **dict.fromkeys(("num_rows", "x_stride", "projection_stride", "out_stride"), "i32"),
        **{"K": width, "R": rank, "COPY": copy, "BLOCK_R": max(16, 1 << (rank - 1).bit_length())},
        **{"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
    }
    options = {"num_warps": tile.num_warps, "num_stages": beside.STAGES}
    archs = (90,) if tile is beside.TALL else (80, 90)
    return Variant(beside.low_rank_beside_kernel, arguments, options, unaligned=("num_rows",), archs=archs)


_QKV, _SMALL_QKV = (6144, (4096, 5120)), (3072, (2048, 2560))

VARIANTS = [
    # Compiled for 8.0 as well, where it never runs.
    _pair(kernels.WIDE, 4096, 16),
    _pair(kernels.WIDE, _QKV[0], 16, _QKV[1]),
    _pair(kernels.WIDE, _SMALL_QKV[0], 16, _SMALL_QKV[1], "*fp16"),
    *(_pair(tile, 4096, rank) for tile in (kernels.NARROW, kernels.SMALL) for rank in (16, 32)),
    _pair(kernels.SMALL, _QKV[0], 16, _QKV[1]),
    *(_pair(tile, 2300, 5, (), "*fp16") for tile in (kernels.NARROW, kernels.SMALL)),
    *(_sums(tile, width, 16, begins) for tile in (kernels.WIDE, kernels.SMALL) for width, begins in (_QKV, (4096, ()))),
    _sums(kernels.NARROW, _QKV[0], 32, _QKV[1]),
    *(_beside(tile, 4096, 16) for tile in (beside.TALL, beside.SHORT)),
    *(_beside(tile, 4096, rank, copy=False) for tile in (beside.TALL, beside.SHORT) for rank in (32, 48)),
    *(_beside(tile, 2300, 5, pointer="*fp16") for tile in (beside.TALL, beside.SHORT)),
]
