"""Launches of the fused block's elementwise and low-rank kernels: Llama-3-8B at 8192 and 2048 tokens, Qwen3's heads."""

from __future__ import annotations

from typing import Any

from compiling import Variant

from fourfold.kernels import low_rank_triton, norm_triton, rotary_backward_triton, rotary_triton, swiglu_triton
from fourfold.kernels.launching import next_power_of_2

_TRITON_TYPE = {2: "*bf16", 4: "*fp32"}


def _ranks(rank: int) -> dict[str, int]:
    return {"R": rank, "BLOCK_R": max(16, next_power_of_2(max(rank, 1)))}


def _norm(num_rows: int, width: int, rank: int, element_size: int = 2) -> list[Variant]:
    tile = norm_triton.tile_for(num_rows, width, rank, element_size)
    pointer = _TRITON_TYPE[element_size]
    common: dict[str, Any] = {
        **dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), pointer),
        "p_ptr": pointer if rank else None,
        "rstd_ptr": "*fp32",
        **dict.fromkeys(("num_rows", "x_stride", "out_stride", "p_stride_r"), "i32"),
        "p_stride_k": 1,
        "K": width,
        **_ranks(rank),
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
    }
    backward = {"grad_ptr": pointer, "residual_ptr": pointer, "grad_stride": "i32", "residual_stride": "i32"}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return [
        Variant(norm_triton.rms_norm_kernel, {**common, "eps": "fp32"}, options),
        Variant(norm_triton.rms_norm_backward_kernel, {**common, **backward}, options),
    ]


def _swiglu(num_rows: int, rank: int, low_rank: int, element_size: int = 2) -> list[Variant]:
    pointer = _TRITON_TYPE[element_size]
    forward, backward = (
        swiglu_triton.forward_tile_for(num_rows, low_rank, element_size),
        swiglu_triton.backward_tile_for(num_rows, max(rank, low_rank), element_size),
    )
    integers = dict.fromkeys(("num_rows", "p_stride_r", "product_stride"), "i32")
    common: dict[str, Any] = {
        **integers,
        "product_ptr": "*fp32",
        "p_stride_k": 1,
        "BLOCKS": 64,
        "I": 14336,
        "GELU": False,
    }
    return [
        Variant(
            swiglu_triton.swiglu_kernel,
            {
                **common,
                "gate_up_ptr": pointer,
                "p_ptr": pointer if low_rank else None,
                "out_ptr": pointer,
                "in_stride": "i32",
                "out_stride": "i32",
                **_ranks(low_rank),
                "BLOCK_M": forward.block_m,
                "BLOCK_K": forward.block_k,
            },
            {"num_warps": forward.num_warps, "num_stages": forward.num_stages},
        ),
        Variant(
            swiglu_triton.swiglu_backward_kernel,
            {
                **common,
                **dict.fromkeys(("gate_up_ptr", "grad_ptr"), pointer),
                "low_ptr": pointer if low_rank else None,
                "down_a_ptr": pointer if low_rank else None,
                "p_ptr": pointer if rank else None,
                **dict.fromkeys(("gate_up_stride", "grad_stride", "low_stride", "down_a_stride_r"), "i32"),
                "down_a_stride_k": 1,
                "L": low_rank,
                "BLOCK_L": max(16, next_power_of_2(max(low_rank, 1))),
                **_ranks(rank),
                "BLOCK_M": backward.block_m,
                "BLOCK_K": backward.block_k,
            },
            {"num_warps": backward.num_warps, "num_stages": backward.num_stages},
        ),
    ]


def _rotary(rank: int, norms: bool, element_size: int = 2) -> list[Variant]:
    pointer = _TRITON_TYPE[element_size]
    norm = pointer if norms else None
    common: dict[str, Any] = {
        **dict.fromkeys(("out_ptr", "cos_ptr", "sin_ptr"), pointer),
        **{"bias_ptr": None, "q_norm_ptr": norm, "k_norm_ptr": norm},
        **dict.fromkeys(("num_rows", "out_stride", "num_positions", "cos_stride"), "i32"),
        **{"eps": "fp32", "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "D": 128, "HALF": 64, "BLOCK_HALF": 64},
        "BLOCK_M": rotary_triton.BLOCK_ROWS,
    }
    forward = {"qkv_ptr": pointer, "in_stride": "i32", "ALL_HEADS": 48, "BLOCK_REST": 1, "HEADS": 4}
    backward = {
        **dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr"), pointer),
        "raw_ptr": norm,
        "p_ptr": pointer if rank else None,
        **dict.fromkeys(("dq_stride", "dk_stride", "dv_stride", "raw_stride", "p_stride_r"), "i32"),
        "p_stride_k": 1,
        **_ranks(rank),
        "BLOCK_REST": 16,
        "PARTS": 1 if rank else rotary_backward_triton.HEAD_PARTS,
    }
    return [
        Variant(rotary_triton.rotary_kernel, {**common, **forward}, {"num_warps": 4}),
        Variant(
            rotary_backward_triton.rotary_backward_kernel, {**common, **backward}, {"num_warps": 4, "num_stages": 2}
        ),
    ]


def _low_rank(rank: int, element_size: int = 2) -> list[Variant]:
    pointer = _TRITON_TYPE[element_size]
    block_m, block_n = (64, 128) if element_size == 2 else (32, 64)
    project = {
        **{"x_ptr": pointer, "a_ptr": pointer, "out_ptr": "*fp32"},
        **dict.fromkeys(("num_rows", "x_stride", "a_stride_r"), "i32"),
        **{
            "a_stride_k": 1,
            "BLOCKS": 8,
            "K": 4096,
            "BLOCK_M": 64,
            "BLOCK_K": 128 if element_size == 2 else 32,
            **_ranks(rank),
        },
    }
    grad = {
        **{"p_ptr": pointer, "q_ptr": pointer, "out_ptr": "*fp32"},
        **dict.fromkeys(("num_rows", "p_stride", "q_stride", "out_stride"), "i32"),
        **{"BLOCKS": 8, "N": 4096, "BLOCK_M": block_m, "BLOCK_N": block_n, "ADD": False, **_ranks(rank)},
    }
    return [
        Variant(low_rank_triton.project_kernel, project, {"num_warps": 4, "num_stages": 3}),
        Variant(low_rank_triton.low_rank_grad_kernel, grad, {"num_warps": 4, "num_stages": 4}),
    ]


VARIANTS = [
    *(variant for rank in (0, 16, 32, 48, 64) for variant in _norm(8192, 4096, rank)),
    *_norm(2048, 4096, 48),
    *_norm(8192, 576, 0),
    *_norm(8192, 4096, 16, element_size=4),
    *(variant for low_rank in (0, 16, 64) for variant in _swiglu(8192, 2 * min(low_rank, 32), low_rank)),
    *_swiglu(8192, 32, 16, element_size=4),
    *(variant for rank in (0, 16, 48) for norms in (False, True) for variant in _rotary(rank, norms)),
    *(variant for rank in (16, 48, 64) for variant in _low_rank(rank)),
    *_low_rank(16, element_size=4),
]
