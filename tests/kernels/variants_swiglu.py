"""Launches of the gated activation's kernels that carry the adapters' products: Llama-3-8B and SmolLM2-135M."""

from __future__ import annotations

from typing import Any

from compiling import Variant

from fourfold.kernels import swiglu_low_rank_triton as kernels


def _tile(tile: kernels.Pass) -> tuple[dict[str, int], dict[str, Any]]:
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": tile.max_registers}
    return {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}, options


def _forward(width: int, rank: int, gelu: bool, splits: int) -> Variant:
    block, options = _tile(kernels.FORWARD_PASS)
    arguments = {
        **dict.fromkeys(("gate_up_ptr", "projection_ptr", "out_ptr"), "*bf16"),
        "product_ptr": "*bf16" if splits == 1 else "*fp32",
        **dict.fromkeys(("num_rows", "in_stride", "projection_stride", "out_stride", "product_stride"), "i32"),
        **{"SPLIT": width // splits, "I": width, "R": rank, "GELU": gelu, "BLOCK_R": kernels.rank_block(rank)},
        **block,
    }
    return Variant(kernels.swiglu_product_kernel, arguments, options)


def _backward(width: int, rank: int, gelu: bool, wide_first: bool) -> Variant:
    block, options = _tile(kernels.BACKWARD_PASS)
    arguments = {
        **dict.fromkeys(("gate_up_ptr", "out_ptr", "grad_ptr", "low_ptr", "grad_low_ptr"), "*bf16"),
        "sums_ptr": "*fp32",
        **dict.fromkeys(("num_rows", "split_rows", "gate_up_stride", "grad_stride"), "i32"),
        **dict.fromkeys(("low_stride", "grad_low_stride"), "i32"),
        **{"SPLIT": 1024, "I": width, "GELU": gelu, "WIDE_FIRST": wide_first},
        **dict.fromkeys(("GATE_RANK", "UP_RANK", "DOWN_RANK"), rank),
        **dict.fromkeys(("BLOCK_GATE", "BLOCK_UP", "BLOCK_DOWN"), kernels.rank_block(rank)),
        **block,
    }
    return Variant(kernels.swiglu_backward_sums_kernel, arguments, options)


VARIANTS = [
    *(_forward(width, 16, gelu, 1) for width in (14336, 1536) for gelu in (False, True)),
    *(_forward(14336, rank, False, 2) for rank in (8, 32, 64)),
    *(_backward(width, 16, gelu, wide) for width in (14336, 1536) for gelu in (False, True) for wide in (False, True)),
]
