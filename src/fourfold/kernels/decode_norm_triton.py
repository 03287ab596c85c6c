"""Triton kernels of decode_norm.py. A program has a row of x, which it norms, and a row of A."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.early_triton import AT_ONCE_ROWS, begin, wait
from fourfold.kernels.launching import launches_early, next_power_of_2, on_device

__all__ = ["decode_norm", "low_products", "to_operand"]


@triton.jit
def to_operand(x: tl.tensor) -> tl.tensor:
    """fp32 as fp16, where it is too large its largest number."""
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def decode_norm_kernel(
    out_ptr: tl.tensor,  # fp16 [M, K]; None where x is no norm's
    low_ptr: tl.tensor,  # [M, R] or None
    x_ptr: tl.tensor,  # [M, K]
    weight_ptr: tl.tensor,  # [K], or None for x as it is
    lora_a_ptr: tl.tensor,  # [R, K] or None
    num_ranks: tl.tensor,
    eps: tl.tensor,
    x_scale: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """Program (m, 0) writes row m of `out`, where there is one; program (m, i) column i of that row of `low`."""
    begin(EARLY, AT_ONCE)
    m = tl.program_id(0)
    part = tl.program_id(1)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    # What is no activation is loaded before the launch waits for the one before it.
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    if lora_a_ptr is not None:
        a = tl.load(lora_a_ptr + part * K + columns, mask=inside, other=0.0)
    wait(EARLY, AT_ONCE)
    x = tl.load(x_ptr + m * K + columns, mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x) / K + eps)
        # Cast before multiplying by the weight, and after.
        normed = (x * rstd).to(weight.dtype).to(tl.float32)
        x = (weight.to(tl.float32) * normed).to(weight.dtype).to(tl.float32)
    else:
        x *= x_scale
    if out_ptr is not None:
        tl.store(out_ptr + m * K + columns, to_operand(x), mask=columns < K * (1 - part))
    if lora_a_ptr is not None:
        product = tl.sum(a.to(tl.float32) * x)
        tl.store(low_ptr + m * num_ranks + part, product.to(low_ptr.dtype.element_ty))


def _launch(
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    eps: float,
    lora_a: Tensor | None,
    x_scale: float,
    dtype: torch.dtype,
    early: bool | None,
) -> Tensor:
    num_inputs, width = x.shape
    num_ranks = 0 if lora_a is None else len(lora_a)
    low = torch.empty(num_inputs, num_ranks, dtype=dtype, device=x.device)
    block_k = next_power_of_2(width)
    early = launches_early(x.device) if early is None else early
    with on_device(x):
        decode_norm_kernel[(num_inputs, max(1, num_ranks))](
            *(out, low if num_ranks else None, x, weight, lora_a, num_ranks, eps, float(x_scale)),
            K=width,
            BLOCK_K=block_k,
            EARLY=early,
            AT_ONCE=num_inputs <= AT_ONCE_ROWS,
            num_warps=max(1, min(block_k // 512, 16)),
            launch_pdl=early,
        )
    return low


def decode_norm(
    x: Tensor, weight: Tensor, eps: float, lora_a: Tensor | None, early: bool | None = None
) -> tuple[Tensor, Tensor]:
    """`decode_norm.decode_norm`."""
    out = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    return out, _launch(x, out, weight, eps, lora_a, 1.0, x.dtype, early)


def low_products(x: Tensor, lora_a: Tensor, x_scale: float, dtype: torch.dtype, early: bool | None = None) -> Tensor:
    """`decode_norm.low_products`."""
    return _launch(x, None, None, 0.0, lora_a, x_scale, dtype, early)
