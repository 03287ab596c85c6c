"""Launches of the gated activation's kernels that carry the adapters' products: Llama-3-8B and SmolLM2-135M."""

from __future__ import annotations

from typing import Any

from compiling import Variant

from fourfold.kernels import swiglu_low_rank_triton as kernels
from fourfold.kernels.shares_triton import Pass


def _forward(width: int, rank: int, gelu: bool = False) -> Variant:
    tile = kernels.FORWARD_TILE
    share = min(width, kernels.MAXIMUM_COLUMNS)
    arguments = {
        **dict.fromkeys(("gate_up_ptr", "projection_ptr", "out_ptr"), "*bf16"),
        "product_ptr": "*bf16" if share == width else "*fp32",
        **dict.fromkeys(("num_rows", "in_stride", "projection_stride", "out_stride", "product_stride"), "i32"),
        **{"SHARE": share, "I": width, "R": rank, "GELU": gelu, "BLOCK_R": kernels.rank_block(rank)},
        **{"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
    }
    options = {"num_warps": tile.num_warps, "num_stages": kernels.forward_stages(rank)}
    return Variant(kernels.swiglu_product_kernel, arguments, options)


def _backward(tile: Pass, width: int, ranks: tuple[int, int, int], gelu: bool = False) -> Variant:
    names = ("GATE", "UP", "DOWN")
    arguments: dict[str, Any] = {
        **dict.fromkeys(("gate_up_ptr", "out_ptr", "grad_ptr"), "*bf16"),
        "low_ptr": "*bf16" if ranks[0] + ranks[1] else None,
        "grad_low_ptr": "*bf16" if ranks[2] else None,
        "sums_ptr": "*fp32",
        **dict.fromkeys(("num_rows", "share_rows", "gate_up_stride", "grad_stride"), "i32"),
        **dict.fromkeys(("low_stride", "grad_low_stride"), "i32"),
        **{"SHARE": 0, "I": width, "GELU": gelu, "WIDE_FIRST": tile.wide_first},
        **{f"{name}_RANK": rank for name, rank in zip(names, ranks, strict=True)},
        **{f"BLOCK_{name}": kernels.rank_block(rank) for name, rank in zip(names, ranks, strict=True)},
        **{"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k},
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers}
    return Variant(kernels.swiglu_backward_sums_kernel, arguments, options)


def _sum(width: int, ranks: tuple[int, int, int], shares: int, add: bool) -> Variant:
    names = ("GATE", "UP", "DOWN")
    arguments = {
        **{"out_ptr": "*fp32", "shares_ptr": "*fp32", "gate_scaling": "fp32", "up_scaling": "fp32", "I": width},
        **{f"{name}_RANK": rank for name, rank in zip(names, ranks, strict=True)},
        **{f"BLOCK_{name}": kernels.rank_block(rank) for name, rank in zip(names, ranks, strict=True)},
        **{"SHARES": shares, "ADD": add, "BLOCK": kernels.SUM_COLUMNS},
    }
    return Variant(kernels.sum_columns_kernel, arguments, {"num_warps": 4})


_THIRDS = ((16, 16, 16), (8, 8, 8), (16, 0, 16), (0, 0, 16))

VARIANTS = [
    *(_forward(14336, rank) for rank in (16, 32, 64)),
    _forward(1536, 16),
    _forward(14336, 16, gelu=True),
    *(_backward(kernels.SHORT, 14336, ranks) for ranks in _THIRDS),
    # Compiled for 8.0 as well, where it never runs.
    *(_backward(kernels.LONG, 14336, ranks) for ranks in _THIRDS[:3]),
    *(_backward(tile, 14336, (16, 16, 16), gelu=True) for tile in (kernels.LONG, kernels.MANY_RANKS)),
    _backward(kernels.MANY_RANKS, 14336, (64, 64, 64), gelu=True),
    *(_backward(tile, 1536, (16, 16, 16)) for tile in (kernels.LONG, kernels.SHORT)),
    _backward(kernels.LONG, 14336, (32, 32, 32)),
    *(_backward(kernels.MANY_RANKS, 14336, (rank, rank, rank)) for rank in (32, 64)),
    *(_sum(14336, (16, 16, 16), shares, add) for shares, add in ((1, False), (4, False), (7, False), (4, True))),
    _sum(14336, (64, 64, 64), 14, True),
    _sum(14336, (8, 0, 5), 4, False),
]
