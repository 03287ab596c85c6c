# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: N803, N806
"""Triton kernel of rotary.py's backward pass.

A program owns some rows and some heads of them; with a projection it owns all heads of its rows, since the low-rank
product sums over them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device
from fourfold.kernels.low_rank import fill_columns, fused
from fourfold.kernels.rotary_triton import BLOCK_ROWS, half_of, load_angles, load_biased

__all__ = ["HEAD_PARTS", "rotary_backward"]

# Programs that share the heads of a row where no product sums over them.
HEAD_PARTS = 4


@triton.jit
def _product(
    acc, x, p_ptr, columns, column, WIDTH: tl.constexpr, stride_r, stride_k,
    ranks, R: tl.constexpr,
):  # fmt: skip
    """acc + x @ P[:, column : column + WIDTH].T"""
    offsets = (column + columns)[:, None].to(tl.int64) * stride_k + ranks[None, :].to(tl.int64) * stride_r
    p = tl.load(p_ptr + offsets, (columns < WIDTH)[:, None] & (ranks < R)[None, :], 0.0)
    return tl.dot(x, p, acc, input_precision="ieee")


@triton.jit
def _backward_heads(
    acc,
    grad_ptr,  # dq, dk or dv
    grad_stride,
    raw_ptr,
    raw_stride,
    out_ptr,
    out_stride,
    bias_ptr,
    norm_ptr,
    p_ptr,
    p_stride_r,
    p_stride_k,
    cos,
    sin,
    rows,
    row_mask,
    part,
    eps,
    COUNT: tl.constexpr,  # heads that grad_ptr has
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,  # heads before them in qkv
    ROTATED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    REST: tl.constexpr = D - 2 * HALF
    columns = tl.arange(0, BLOCK_HALF)
    rest_columns = tl.arange(0, BLOCK_REST)
    ranks = tl.arange(0, BLOCK_R)
    for index in range(0, (COUNT + PARTS - 1) // PARTS):
        head = part + index * PARTS
        present = row_mask & (head < COUNT)
        mask = present[:, None] & (columns < HALF)[None, :]
        rest_mask = present[:, None] & (rest_columns < REST)[None, :]
        base = grad_ptr + rows[:, None] * grad_stride + head * D
        column = (OFFSET + head) * D
        first = tl.load(base + columns[None, :], mask, 0.0).to(tl.float32)
        second = tl.load(base + HALF + columns[None, :], mask, 0.0).to(tl.float32)
        if REST > 0:
            rest = tl.load(base + 2 * HALF + rest_columns[None, :], rest_mask, 0.0).to(tl.float32)
        if ROTATED:
            turned = first * cos + second * sin
            second = second * cos - first * sin
            first = turned
        if norm_ptr is not None:
            raw = raw_ptr + rows[:, None] * raw_stride + column
            x1 = load_biased(raw, columns, bias_ptr, column, present, HALF)
            x2 = load_biased(raw + HALF, columns, bias_ptr, column + HALF, present, HALF)
            first *= tl.load(norm_ptr + columns, columns < HALF, 0.0).to(tl.float32)[None, :]
            second *= tl.load(norm_ptr + HALF + columns, columns < HALF, 0.0).to(tl.float32)[None, :]
            squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
            products = tl.sum(first * x1, 1) + tl.sum(second * x2, 1)
            if REST > 0:
                x3 = load_biased(raw + 2 * HALF, rest_columns, bias_ptr, column + 2 * HALF, present, REST)
                weight = tl.load(norm_ptr + 2 * HALF + rest_columns, rest_columns < REST, 0.0)
                rest *= weight.to(tl.float32)[None, :]
                squares += tl.sum(x3 * x3, 1)
                products += tl.sum(rest * x3, 1)
            rstd = 1.0 / tl.sqrt_rn(squares / D + eps)
            along = (products * rstd * rstd / D)[:, None]
            first = rstd[:, None] * (first - x1 * along)
            second = rstd[:, None] * (second - x2 * along)
            if REST > 0:
                rest = rstd[:, None] * (rest - x3 * along)
        out = out_ptr + rows[:, None] * out_stride + column
        tl.store(out + columns[None, :], first.to(dtype), mask)
        tl.store(out + HALF + columns[None, :], second.to(dtype), mask)
        if REST > 0:
            tl.store(out + 2 * HALF + rest_columns[None, :], rest.to(dtype), rest_mask)
        if R > 0:
            acc = _product(acc, first.to(dtype), p_ptr, columns, column, HALF, p_stride_r, p_stride_k, ranks, R)
            acc = _product(acc, second.to(dtype), p_ptr, columns, column + HALF, HALF, p_stride_r, p_stride_k, ranks, R)
            if REST > 0:
                acc = _product(
                    acc, rest.to(dtype), p_ptr, rest_columns, column + 2 * HALF, REST, p_stride_r, p_stride_k, ranks, R
                )
    return acc


@triton.jit
def rotary_backward_kernel(
    dq_ptr,  # [M, NUM_HEADS * D]
    dk_ptr,  # [M, NUM_KV_HEADS * D]
    dv_ptr,
    raw_ptr,  # [M, N] or None
    out_ptr,  # [M, N + columns]
    cos_ptr,
    sin_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    p_ptr,  # [R, N]
    num_rows,
    dq_stride,
    dk_stride,
    dv_stride,
    raw_stride,
    out_stride,
    num_positions,
    cos_stride,
    p_stride_r,
    p_stride_k,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    R: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the heads of a row
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    ROTATED: tl.constexpr = cos_ptr is not None
    N: tl.constexpr = (NUM_HEADS + 2 * NUM_KV_HEADS) * D
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    if ROTATED:
        cos, sin = load_angles(
            cos_ptr, sin_ptr, rows, tl.arange(0, BLOCK_HALF), num_positions, cos_stride, num_rows, HALF
        )
    else:
        cos, sin = 1.0, 0.0
    part = tl.program_id(1)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    acc = _backward_heads(
        acc, dq_ptr, dq_stride, raw_ptr, raw_stride, out_ptr, out_stride, bias_ptr, q_norm_ptr, p_ptr, p_stride_r,
        p_stride_k, cos, sin, rows, row_mask, part, eps,
        NUM_HEADS, PARTS, 0, ROTATED, D, HALF, R, BLOCK_HALF, BLOCK_REST, BLOCK_R,
    )  # fmt: skip
    acc = _backward_heads(
        acc, dk_ptr, dk_stride, raw_ptr, raw_stride, out_ptr, out_stride, bias_ptr, k_norm_ptr, p_ptr, p_stride_r,
        p_stride_k, cos, sin, rows, row_mask, part, eps, NUM_KV_HEADS, PARTS,
        NUM_HEADS, ROTATED, D, HALF, R, BLOCK_HALF, BLOCK_REST, BLOCK_R,
    )  # fmt: skip
    acc = _backward_heads(
        acc, dv_ptr, dv_stride, raw_ptr, raw_stride, out_ptr, out_stride, None, None, p_ptr, p_stride_r,
        p_stride_k, cos, sin, rows, row_mask, part, eps, NUM_KV_HEADS, PARTS,
        NUM_HEADS + NUM_KV_HEADS, False, D, HALF, R, BLOCK_HALF, BLOCK_REST, BLOCK_R,
    )  # fmt: skip
    if R > 0:
        ranks = tl.arange(0, BLOCK_R)
        out = out_ptr + rows[:, None] * out_stride + N + ranks[None, :]
        tl.store(out, acc.to(dtype), row_mask[:, None] & (ranks < R)[None, :])


def rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv_raw: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    projection: Tensor | None = None,
) -> Tensor:
    """`rotary.rotary_backward`."""
    num_rows = dq.shape[0]
    head_dim = dq.shape[1] // num_heads
    total = num_heads + 2 * num_kv_heads
    width = total * head_dim
    columns = 0 if projection is None else projection.shape[0]
    taken = fused(projection)
    rank = 0 if taken is None else columns
    parts = 1 if rank else HEAD_PARTS
    half = half_of(cos, head_dim)
    out = torch.empty(num_rows, width + columns, dtype=dq.dtype, device=dq.device)
    with on_device(dq):
        rotary_backward_kernel[(cdiv(num_rows, BLOCK_ROWS), parts)](
            dq,
            dk,
            dv,
            qkv_raw,
            out,
            cos,
            sin,
            bias,
            q_norm,
            k_norm,
            taken,
            num_rows,
            dq.stride(0),
            dk.stride(0),
            dv.stride(0),
            0 if qkv_raw is None else qkv_raw.stride(0),
            out.stride(0),
            1 if cos is None else cos.shape[0],
            0 if cos is None else cos.stride(0),
            0 if taken is None else taken.stride(0),
            0 if taken is None else taken.stride(1),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            D=head_dim,
            HALF=half,
            R=rank,
            BLOCK_HALF=max(16, next_power_of_2(half)),
            BLOCK_REST=max(16, next_power_of_2(max(head_dim - 2 * half, 1))),
            BLOCK_R=max(16, next_power_of_2(max(rank, 1))),
            PARTS=parts,
            BLOCK_M=BLOCK_ROWS,
            num_warps=4,
            num_stages=2,
        )
        fill_columns(out, width, projection)
    return out
