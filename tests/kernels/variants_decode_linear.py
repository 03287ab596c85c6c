"""The launches of a decode step's linear layers, in the shapes of Llama-3-8B."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from compiling import Variant

from fourfold.kernels import decode_linear_triton as ours
from fourfold.kernels.decode_spread_triton import decode_spread_kernel
from fourfold.kernels.decode_tiles import Tile, tile_for


def launch(
    columns: int,
    members: int,
    tile: Tile,
    *,
    nested: bool = True,
    rank: int = 0,
    bias: bool = False,
    residual: bool = False,
    gated: bool = False,
    lookup: str = "table",
    early: bool = True,
    dtype: tl.dtype = tl.bfloat16,
    tolerated: int = 0,
    spread: bool = False,
) -> Variant:
    name = "*bf16" if dtype == tl.bfloat16 else "*fp16"

    def three(label: str, type: str | None) -> dict[str, Any]:
        return {f"{label}_{i}": type if i < members else None for i in range(3)}

    arguments = {
        **{"out_ptr": "*fp16" if gated else name, "x_ptr": "*fp16", "codebook_ptr": "*fp32"},
        **three("codes", "*u8"),
        **three("scales", "*u8" if nested else "*fp32"),
        **three("nested", "*fp32" if nested else None),
        **three("offset", "*fp32" if nested else None),
        "code_map_ptr": "*fp32" if nested else None,
        "bias_ptr": name if bias else None,
        "residual_ptr": name if residual else None,
        "low_ptr": name if rank else None,
        "up_ptr": name if rank else None,
        **dict.fromkeys(["num_inputs", "row_1", "row_2", "num_rows", "zero"], "i32"),
        **dict.fromkeys(["x_scale", "out_scale"], "fp32"),
        **{"COLUMNS": columns, "NESTED_SHIFT": 8 if nested else 0, "LOOKUP": lookup, "BLOCK_M": tile.block_m},
        **{"partial_ptr": "*fp32" if tile.tiles > 1 else None, "PACKED": nested},
        **{"TILES": tile.tiles, "HELD_TILES": triton.next_power_of_2(tile.tiles)},
        **{"ROWS": tile.rows, "ROW_WARPS": tile.row_warps, "COLUMN_WARPS": tile.column_warps},
        "SPANS": -(-columns // (256 * tile.column_warps)),
        **{"RANK": rank, "RANKS": members * rank, "ACTIVATION": "silu" if gated else ""},
        **{"DTYPE": dtype, "EARLY": early, "AT_ONCE": spread},
    }
    warps = tile.row_warps * tile.column_warps
    options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False, "launch_pdl": early}
    options["maxnreg"] = tile.registers
    unaligned = ("num_inputs", "row_1", "row_2", "num_rows", "zero")
    kernel = decode_spread_kernel if spread else ours.decode_linear_kernel
    return Variant(kernel, arguments, options, unaligned, archs=(90,) if early else (80,), tolerated=tolerated)


# Of few and many rows of x and of W, and of a long row of W, as `tile_for` has them.
ONE, ONE_SQUARE, ONE_MANY, ONE_LONG = (
    tile_for(1, rows, columns, 132, packed=True)
    for rows, columns in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
)
FEW, MANY, LONG = (tile_for(8, rows, columns, 132) for rows, columns in ((6144, 4096), (28672, 4096), (4096, 14336)))
BATCH, BATCH_MANY, BATCH_LONG, BATCH_SQUARE, BATCH_TWICE = (
    tile_for(inputs, rows, columns, 132)
    for inputs, rows, columns in (
        *((32, 6144, 4096), (32, 28672, 4096), (32, 4096, 14336), (32, 4096, 4096), (64, 4096, 14336)),
    )
)
VARIANTS = [
    launch(4096, 3, ONE, rank=16, bias=True, spread=True),
    launch(4096, 1, ONE_SQUARE, residual=True, spread=True),
    launch(4096, 2, ONE_MANY, gated=True, rank=16, spread=True),
    launch(14336, 1, ONE_LONG, residual=True, rank=64, spread=True),
    launch(4096, 2, ONE_MANY, gated=True, spread=True, early=False),
    launch(640, 2, ONE, nested=False, gated=True, dtype=tl.float16, spread=True, early=False),
    launch(4096, 3, FEW, rank=16, bias=True),
    launch(4096, 3, BATCH, rank=16, bias=True),
    launch(4096, 1, BATCH_SQUARE, residual=True, rank=128),
    launch(14336, 1, LONG, residual=True, rank=64, tolerated=16),
    # 34 us, where without a limit that spills nothing it takes 40.
    launch(14336, 1, BATCH_LONG, residual=True, tolerated=64),
    launch(14336, 1, BATCH_LONG, residual=True, rank=128, tolerated=64),
    # 32 rows of W and of x to a warp: 34 us where 16 rows of W, which spill nothing, take 45.
    launch(14336, 1, BATCH_TWICE, residual=True, tolerated=64),
    launch(14336, 1, BATCH_TWICE, residual=True, rank=128, tolerated=64),
    launch(4096, 2, MANY, gated=True, rank=16),
    # 57 us where tiles that spill nothing take 73.
    launch(4096, 2, BATCH_MANY, gated=True, tolerated=96),
    launch(4096, 2, BATCH_MANY, gated=True, rank=128, tolerated=96),
    launch(4096, 2, MANY, gated=True, early=False),
    launch(4096, 1, FEW, lookup="shuffle"),
    launch(576, 2, FEW, nested=False, gated=True, dtype=tl.float16),
]
