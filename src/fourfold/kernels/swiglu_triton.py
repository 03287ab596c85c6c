# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of swiglu.py. A program owns a tile of rows and columns of y and moves each byte once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import Tile, cdiv, on_device
from fourfold.kernels.low_rank import fill_columns, new_extended

__all__ = ["BACKWARD_TILE", "FORWARD_TILE", "activation_and_slope", "swiglu", "swiglu_backward_"]

FORWARD_TILE = Tile(4, 512, 4)
BACKWARD_TILE = Tile(4, 512, 4)


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    if EXACT:
        return tl.sigmoid(x)
    # 1 / y by the square of 1 / sqrt(y): a division takes eight instructions, for divisors beyond 2**126 alone. The
    # few units of fp32's last place that it costs leave what is rounded to 16 bits as close to the truth as before.
    root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def activation_and_slope(gate, GELU: tl.constexpr, EXACT: tl.constexpr):
    """The activation and its derivative, fp32; EXACT where results are not rounded to 16 bits."""
    if GELU:
        # tanh(z) = 2 sigmoid(2 z) - 1, which neither overflows nor divides by zero.
        tanh = 2 * _sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate), EXACT) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        value = 0.5 * gate * (1 + tanh)
        derivative = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * slope
    else:
        sigmoid = _sigmoid(gate, EXACT)
        value = gate * sigmoid
        derivative = sigmoid + value * (1 - sigmoid)
    return value, derivative


@triton.jit
def swiglu_kernel(
    gate_up_ptr,  # [M, 2I]
    out_ptr,  # [M, I]
    num_rows,
    in_stride,
    out_stride,
    I: tl.constexpr,  # noqa: E741
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < num_rows)[:, None] & (columns < I)[None, :]
    gate_at = gate_up_ptr + rows[:, None] * in_stride + columns[None, :]
    gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
    up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
    value, _ = activation_and_slope(gate, GELU, dtype == tl.float32)
    y = (value.to(dtype).to(tl.float32) * up).to(dtype)
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], y, mask)


def swiglu(gate_up: Tensor, projection: Tensor | None = None, activation: str = "silu") -> Tensor:
    """`swiglu.swiglu`."""
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    rank = 0 if projection is None else projection.shape[0]
    tile = FORWARD_TILE
    out = new_extended(gate_up, num_rows, width, rank)
    with on_device(gate_up):
        swiglu_kernel[(cdiv(num_rows, tile.block_m), cdiv(width, tile.block_k))](
            gate_up,
            out,
            num_rows,
            gate_up.stride(0),
            out.stride(0),
            I=width,
            GELU=activation == "gelu_tanh",
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
        )
    fill_columns(out, width, projection)
    return out


@triton.jit
def swiglu_backward_kernel(
    gate_up_ptr,  # [M, 2I], overwritten
    grad_ptr,  # [M, I], overwritten
    num_rows,
    gate_up_stride,
    grad_stride,
    I: tl.constexpr,  # noqa: E741
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (rows < num_rows)[:, None] & (columns < I)[None, :]
    gate_at = gate_up_ptr + rows[:, None] * gate_up_stride + columns[None, :]
    grad_at = grad_ptr + rows[:, None] * grad_stride + columns[None, :]
    grad = tl.load(grad_at, mask, 0.0).to(tl.float32)
    gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
    up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
    value, derivative = activation_and_slope(gate, GELU, dtype == tl.float32)
    value = value.to(dtype).to(tl.float32)
    tl.store(grad_at, (value * up).to(dtype), mask)
    tl.store(gate_at, (grad * up * derivative).to(dtype), mask)
    tl.store(gate_at + I, (grad * value).to(dtype), mask)


def swiglu_backward_(
    gate_up_ext: Tensor, grad: Tensor, projection: Tensor | None = None, activation: str = "silu"
) -> None:
    """`swiglu.swiglu_backward_`."""
    num_rows, width = grad.shape
    tile = BACKWARD_TILE
    with on_device(grad):
        swiglu_backward_kernel[(cdiv(num_rows, tile.block_m), cdiv(width, tile.block_k))](
            gate_up_ext,
            grad,
            num_rows,
            gate_up_ext.stride(0),
            grad.stride(0),
            I=width,
            GELU=activation == "gelu_tanh",
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
        )
    fill_columns(gate_up_ext, 2 * width, projection)
