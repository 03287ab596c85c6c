"""The launches of a decode step's linear layers, in the shapes of Llama-3-8B."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from compiling import Variant

from fourfold.kernels import decode_linear_triton as ours


def launch(
    columns: int,
    members: int,
    block_m: int,
    *,
    nested: bool = True,
    rank: int = 0,
    bias: bool = False,
    residual: bool = False,
    gated: bool = False,
    lookup: str = "table",
    early: bool = True,
    dtype: tl.dtype = tl.bfloat16,
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
        **dict.fromkeys(["num_inputs", "row_1", "row_2", "num_rows"], "i32"),
        **dict.fromkeys(["x_scale", "out_scale"], "fp32"),
        **{"COLUMNS": columns, "NESTED_SHIFT": 8 if nested else 0, "LOOKUP": lookup, "BLOCK_M": block_m},
        **{"ROWS": ours.ROWS[block_m], "WARPS": ours.WARPS, "SPANS": -(-columns // (256 * ours.WARPS))},
        **{"RANK": rank, "RANKS": members * rank, "ACTIVATION": "silu" if gated else ""},
        **{"DTYPE": dtype, "EARLY": early},
    }
    options = {"num_warps": ours.WARPS, "num_stages": 1, "enable_fp_fusion": False, "launch_pdl": early}
    unaligned = ("num_inputs", "row_1", "row_2", "num_rows")
    return Variant(ours.decode_linear_kernel, arguments, options, unaligned, archs=(90,) if early else (80,))


VARIANTS = [
    launch(4096, 3, 8, rank=16, bias=True),
    launch(4096, 3, 16, rank=16, bias=True),
    launch(14336, 1, 8, residual=True, rank=64),
    launch(4096, 2, 8, gated=True, rank=16),
    launch(4096, 2, 16, gated=True, early=False),
    launch(4096, 1, 8, lookup="shuffle"),
    launch(576, 2, 8, nested=False, gated=True, dtype=tl.float16),
]
