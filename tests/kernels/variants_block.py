"""Launches of the fused block's kernels: Llama-3-8B and SmolLM2-135M, and the heads of Qwen3."""

from __future__ import annotations

from typing import Any

from compiling import Variant

from fourfold.kernels import angles_triton, norm_triton, rotary_triton, swiglu_triton
from fourfold.kernels.launching import Tile

_TRITON_TYPE = {2: "*bf16", 4: "*fp32"}


def _tiled(tile: Tile) -> tuple[dict[str, int], dict[str, int]]:
    return {"BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k}, {"num_warps": tile.num_warps}


def _norm(width: int, element_size: int = 2) -> list[Variant]:
    block, options = _tiled(norm_triton.tile_for(width))
    _, backward_options = _tiled(norm_triton.tile_for(width, backward=True))
    pointer = _TRITON_TYPE[element_size]
    common: dict[str, Any] = {
        **dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), pointer),
        "rstd_ptr": "*fp32",
        **dict.fromkeys(("num_rows", "x_stride", "out_stride"), "i32"),
        "K": width,
        **block,
    }
    backward = {"grad_ptr": pointer, "residual_ptr": pointer, "grad_stride": "i32", "residual_stride": "i32"}
    plain = {"eps": "fp32", "addend_ptr": None, "copy_ptr": None, "addend_stride": "i32", "copy_stride": "i32"}
    added = {**plain, "addend_ptr": pointer, "copy_ptr": pointer}
    return [
        Variant(norm_triton.rms_norm_kernel, {**common, **plain}, options),
        Variant(norm_triton.rms_norm_kernel, {**common, **added}, options),
        Variant(norm_triton.rms_norm_backward_kernel, {**common, **backward}, backward_options),
    ]


def _swiglu(width: int, gelu: bool, element_size: int = 2) -> list[Variant]:
    pointer = _TRITON_TYPE[element_size]
    forward, forward_options = _tiled(swiglu_triton.FORWARD_TILE)
    backward, backward_options = _tiled(swiglu_triton.BACKWARD_TILE)
    common: dict[str, Any] = {"gate_up_ptr": pointer, "num_rows": "i32", "I": width, "GELU": gelu}
    outputs = {"out_ptr": pointer, "in_stride": "i32", "out_stride": "i32"}
    gradients = {"grad_ptr": pointer, "gate_up_stride": "i32", "grad_stride": "i32"}
    return [
        Variant(swiglu_triton.swiglu_kernel, {**common, **outputs, **forward}, forward_options),
        Variant(swiglu_triton.swiglu_backward_kernel, {**common, **gradients, **backward}, backward_options),
    ]


def _rotary(norms: bool, rotary_dim: int = 128, element_size: int = 2) -> list[Variant]:
    pointer = _TRITON_TYPE[element_size]
    norm, half, rest = pointer if norms else None, rotary_dim // 2, 128 - rotary_dim
    common: dict[str, Any] = {
        **dict.fromkeys(("out_ptr", "cos_ptr", "sin_ptr"), pointer),
        **{"bias_ptr": None, "q_norm_ptr": norm, "k_norm_ptr": norm},
        **dict.fromkeys(("num_rows", "out_stride", "num_positions", "cos_stride"), "i32"),
        **{"eps": "fp32", "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "D": 128, "HALF": half, "BLOCK_HALF": half},
        "BLOCK_REST": max(rest, 1),
        "BLOCK_M": rotary_triton.BLOCK_ROWS,
    }
    forward = {"qkv_ptr": pointer, "in_stride": "i32", "ALL_HEADS": 48, "HEADS": rotary_triton.HEADS_PER_PROGRAM}
    backward = {
        **dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr"), pointer),
        "raw_ptr": norm,
        **dict.fromkeys(("dq_stride", "dk_stride", "dv_stride", "raw_stride"), "i32"),
        "PARTS": rotary_triton.HEAD_PARTS,
    }
    return [
        Variant(rotary_triton.rotary_kernel, {**common, **forward}, {"num_warps": 4}),
        Variant(rotary_triton.rotary_backward_kernel, {**common, **backward}, {"num_warps": 4, "num_stages": 2}),
    ]


def _angles(pointer: str, half: int) -> Variant:
    arguments = {
        **{"position_ptr": "*i64", "frequency_ptr": "*fp32", "cos_ptr": pointer, "sin_ptr": pointer},
        **{"num_rows": "i32", "scaling": "fp32", "HALF": half, "BLOCK_HALF": half},
        "BLOCK_M": angles_triton.BLOCK_ROWS,
    }
    return Variant(angles_triton.rotary_angles_kernel, arguments, {"num_warps": 4, "enable_fp_fusion": False})


VARIANTS = [
    *(variant for width in (576, 4096, 8192, 16384) for variant in _norm(width)),
    *_norm(4096, element_size=4),
    *(variant for gelu in (False, True) for variant in _swiglu(14336, gelu)),
    *_swiglu(1536, False),
    *_swiglu(14336, False, element_size=4),
    *(variant for norms in (False, True) for variant in _rotary(norms)),
    *_rotary(True, rotary_dim=64),
    *_rotary(True, element_size=4),
    *(_angles(pointer, half) for pointer, half in (("*bf16", 64), ("*fp32", 32))),
]
