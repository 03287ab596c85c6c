# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernel of angles.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device

__all__ = ["BLOCK_ROWS", "rotary_angles", "rotary_angles_kernel"]

BLOCK_ROWS = 16


@triton.jit
def rotary_angles_kernel(
    position_ptr,  # [M]
    frequency_ptr,  # [HALF]
    cos_ptr,  # [M, 2 HALF]
    sin_ptr,
    num_rows,
    scaling,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows, columns = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_HALF)
    mask = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    position = tl.load(position_ptr + rows, rows < num_rows, 0).to(tl.float32)
    frequency = tl.load(frequency_ptr + columns, columns < HALF, 0.0)
    angle = position[:, None] * frequency[None, :]
    cos = (tl.cos(angle) * scaling).to(cos_ptr.dtype.element_ty)
    sin = (tl.sin(angle) * scaling).to(sin_ptr.dtype.element_ty)
    at = rows.to(tl.int64)[:, None] * (2 * HALF) + columns[None, :]
    tl.store(cos_ptr + at, cos, mask)
    tl.store(cos_ptr + at + HALF, cos, mask)
    tl.store(sin_ptr + at, sin, mask)
    tl.store(sin_ptr + at + HALF, sin, mask)


def rotary_angles(position_ids: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`angles.rotary_angles` for tensors on one GPU."""
    half = inv_freq.shape[0]
    position_ids, inv_freq = position_ids.contiguous(), inv_freq.to(torch.float32).contiguous()
    cos = torch.empty(*position_ids.shape, 2 * half, dtype=dtype, device=position_ids.device)
    sin = torch.empty_like(cos)
    num_rows = position_ids.numel()
    with on_device(position_ids):
        rotary_angles_kernel[(cdiv(num_rows, BLOCK_ROWS),)](
            position_ids,
            inv_freq,
            cos,
            sin,
            num_rows,
            float(scaling),
            HALF=half,
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_M=BLOCK_ROWS,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return cos, sin
