# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of rotary.py.

A program owns some rows and some heads of them. cos and sin are read once for all its heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv, next_power_of_2, on_device
from fourfold.kernels.low_rank import new_extended

__all__ = ["BLOCK_ROWS", "HEADS_PER_PROGRAM", "HEAD_PARTS", "rotary", "rotary_", "rotary_backward"]

BLOCK_ROWS = 16
# Heads of a program of the forward pass, and programs that share a row's heads in the backward pass.
HEADS_PER_PROGRAM = 4
HEAD_PARTS = 4


@triton.jit
def _load_angles(
    cos_ptr,
    sin_ptr,
    rows,
    columns,
    num_positions,
    cos_stride,
    num_rows,
    HALF: tl.constexpr,
):
    at = (rows % num_positions)[:, None] * cos_stride + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < HALF)[None, :]
    return tl.load(cos_ptr + at, mask, 0.0).to(tl.float32), tl.load(sin_ptr + at, mask, 0.0).to(tl.float32)


@triton.jit
def _load_biased(base, columns, bias_ptr, bias_column, row_mask, bias_width, WIDTH: tl.constexpr):
    """fp32 columns of a head, with the bias, of which `bias_width` columns may be read."""
    x = tl.load(base + columns[None, :], row_mask[:, None] & (columns < WIDTH)[None, :], 0.0).to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + bias_column + columns, columns < bias_width, 0.0)
        x += bias.to(tl.float32)[None, :]
    return x


@triton.jit
def rotary_kernel(
    qkv_ptr,  # [M, N]
    out_ptr,  # [M, N], may be qkv
    cos_ptr,  # [T, rotary_dim] or None
    sin_ptr,
    bias_ptr,  # [N] or None
    q_norm_ptr,  # [D] or None
    k_norm_ptr,
    num_rows,
    in_stride,
    out_stride,
    num_positions,
    cos_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    ALL_HEADS: tl.constexpr,  # heads that are visited: without v's where there is nothing to do for these
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    REST: tl.constexpr = D - 2 * HALF
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    columns = tl.arange(0, BLOCK_HALF)
    rest_columns = tl.arange(0, BLOCK_REST)
    mask = row_mask[:, None] & (columns < HALF)[None, :]
    if cos_ptr is not None:
        cos, sin = _load_angles(cos_ptr, sin_ptr, rows, columns, num_positions, cos_stride, num_rows, HALF)
    for index in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + index
        if head < ALL_HEADS:
            is_v = head >= NUM_HEADS + NUM_KV_HEADS
            base = qkv_ptr + rows[:, None] * in_stride + head * D
            out = out_ptr + rows[:, None] * out_stride + head * D
            first = _load_biased(base, columns, bias_ptr, head * D, row_mask, HALF, HALF)
            second = _load_biased(base + HALF, columns, bias_ptr, head * D + HALF, row_mask, HALF, HALF)
            if REST > 0:
                rest_at = head * D + 2 * HALF
                rest = _load_biased(base + 2 * HALF, rest_columns, bias_ptr, rest_at, row_mask, REST, REST)
            if q_norm_ptr is not None and not is_v:
                squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
                if REST > 0:
                    squares += tl.sum(rest * rest, 1)
                rstd = (1.0 / tl.sqrt_rn(squares / D + eps))[:, None]
                weight_ptr = q_norm_ptr if head < NUM_HEADS else k_norm_ptr
                weight = tl.load(weight_ptr + columns, columns < HALF, 0.0).to(tl.float32)[None, :]
                first = (weight * (first * rstd).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
                weight = tl.load(weight_ptr + HALF + columns, columns < HALF, 0.0).to(tl.float32)[None, :]
                second = (weight * (second * rstd).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
                if REST > 0:
                    weight = tl.load(weight_ptr + 2 * HALF + rest_columns, rest_columns < REST, 0.0)
                    rest = weight.to(tl.float32)[None, :] * (rest * rstd).to(dtype).to(tl.float32)
            if cos_ptr is not None:
                rotated = first * cos - second * sin
                second = tl.where(is_v, second, second * cos + first * sin)
                first = tl.where(is_v, first, rotated)
            tl.store(out + columns[None, :], first.to(dtype), mask)
            tl.store(out + HALF + columns[None, :], second.to(dtype), mask)
            if REST > 0:
                rest_mask = row_mask[:, None] & (rest_columns < REST)[None, :]
                tl.store(out + 2 * HALF + rest_columns[None, :], rest.to(dtype), rest_mask)


def _half_of(cos: Tensor | None, head_dim: int) -> int:
    return (head_dim if cos is None else cos.shape[1]) // 2


def _launch_forward(
    qkv: Tensor,
    out: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: tuple[int, int],
    bias: Tensor | None,
    norms: tuple[Tensor | None, Tensor | None],
    eps: float,
) -> None:
    num_rows, width = qkv.shape
    num_heads, num_kv_heads = heads
    head_dim = width // (num_heads + 2 * num_kv_heads)
    visited = num_heads + num_kv_heads * (1 if out is qkv and bias is None else 2)
    half = _half_of(cos, head_dim)
    with on_device(qkv):
        rotary_kernel[(cdiv(num_rows, BLOCK_ROWS), cdiv(visited, HEADS_PER_PROGRAM))](
            qkv,
            out,
            cos,
            sin,
            bias,
            *norms,
            num_rows,
            qkv.stride(0),
            out.stride(0),
            1 if cos is None else cos.shape[0],
            0 if cos is None else cos.stride(0),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            ALL_HEADS=visited,
            D=head_dim,
            HALF=half,
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(max(head_dim - 2 * half, 1)),
            HEADS=HEADS_PER_PROGRAM,
            BLOCK_M=BLOCK_ROWS,
            num_warps=4,
        )


def rotary(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """`rotary.rotary`."""
    out = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _launch_forward(qkv, out, cos, sin, (num_heads, num_kv_heads), bias, (q_norm, k_norm), eps)
    return out


def rotary_(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None = None,
) -> None:
    """`rotary.rotary_`."""
    if cos is not None or bias is not None:
        _launch_forward(qkv, qkv, cos, sin, (num_heads, num_kv_heads), bias, (None, None), 0.0)


@triton.jit
def _backward_heads(
    grad_ptr,  # dq, dk or dv
    grad_stride,
    raw_ptr,
    raw_stride,
    out_ptr,
    out_stride,
    bias_ptr,
    norm_ptr,
    cos,
    sin,
    rows,
    num_rows,
    part,
    eps,
    COUNT: tl.constexpr,  # heads that grad_ptr has
    PARTS: tl.constexpr,
    OFFSET: tl.constexpr,  # heads before them in qkv
    ROTATED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    REST: tl.constexpr = D - 2 * HALF
    columns = tl.arange(0, BLOCK_HALF)
    rest_columns = tl.arange(0, BLOCK_REST)
    for index in range(0, (COUNT + PARTS - 1) // PARTS):
        head = part + index * PARTS
        present = rows < tl.where(head < COUNT, num_rows, 0)
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
            x1 = _load_biased(raw, columns, bias_ptr, column, present, tl.where(head < COUNT, HALF, 0), HALF)
            x2 = _load_biased(
                raw + HALF, columns, bias_ptr, column + HALF, present, tl.where(head < COUNT, HALF, 0), HALF
            )
            first *= tl.load(norm_ptr + columns, columns < HALF, 0.0).to(tl.float32)[None, :]
            second *= tl.load(norm_ptr + HALF + columns, columns < HALF, 0.0).to(tl.float32)[None, :]
            squares = tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)
            products = tl.sum(first * x1, 1) + tl.sum(second * x2, 1)
            if REST > 0:
                rest_at = column + 2 * HALF
                x3 = _load_biased(
                    raw + 2 * HALF, rest_columns, bias_ptr, rest_at, present, tl.where(head < COUNT, REST, 0), REST
                )
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


@triton.jit
def rotary_backward_kernel(
    dq_ptr,  # [M, NUM_HEADS * D]
    dk_ptr,  # [M, NUM_KV_HEADS * D]
    dv_ptr,
    raw_ptr,  # [M, N] or None
    out_ptr,  # [M, N]
    cos_ptr,
    sin_ptr,
    bias_ptr,
    q_norm_ptr,
    k_norm_ptr,
    num_rows,
    dq_stride,
    dk_stride,
    dv_stride,
    raw_stride,
    out_stride,
    num_positions,
    cos_stride,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PARTS: tl.constexpr,  # programs that share the heads of a row
    BLOCK_M: tl.constexpr,
):
    ROTATED: tl.constexpr = cos_ptr is not None
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    if ROTATED:
        cos, sin = _load_angles(
            cos_ptr, sin_ptr, rows, tl.arange(0, BLOCK_HALF), num_positions, cos_stride, num_rows, HALF
        )
    else:
        cos, sin = 1.0, 0.0
    part = tl.program_id(1)
    _backward_heads(
        dq_ptr, dq_stride, raw_ptr, raw_stride, out_ptr, out_stride, bias_ptr, q_norm_ptr, cos, sin, rows, num_rows,
        part, eps, NUM_HEADS, PARTS, 0, ROTATED, D, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _backward_heads(
        dk_ptr, dk_stride, raw_ptr, raw_stride, out_ptr, out_stride, bias_ptr, k_norm_ptr, cos, sin, rows, num_rows,
        part, eps, NUM_KV_HEADS, PARTS, NUM_HEADS, ROTATED, D, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    _backward_heads(
        dv_ptr, dv_stride, raw_ptr, raw_stride, out_ptr, out_stride, None, None, cos, sin, rows, num_rows,
        part, eps, NUM_KV_HEADS, PARTS, NUM_HEADS + NUM_KV_HEADS, False, D, HALF, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip


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
    room: int = 0,
) -> Tensor:
    """`rotary.rotary_backward`."""
    num_rows = dq.shape[0]
    head_dim = dq.shape[1] // num_heads
    width = (num_heads + 2 * num_kv_heads) * head_dim
    half = _half_of(cos, head_dim)
    out = new_extended(dq, num_rows, width, room)
    with on_device(dq):
        rotary_backward_kernel[(cdiv(num_rows, BLOCK_ROWS), HEAD_PARTS)](
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
            num_rows,
            dq.stride(0),
            dk.stride(0),
            dv.stride(0),
            0 if qkv_raw is None else qkv_raw.stride(0),
            out.stride(0),
            1 if cos is None else cos.shape[0],
            0 if cos is None else cos.stride(0),
            eps,
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=num_kv_heads,
            D=head_dim,
            HALF=half,
            BLOCK_HALF=next_power_of_2(half),
            BLOCK_REST=next_power_of_2(max(head_dim - 2 * half, 1)),
            PARTS=HEAD_PARTS,
            BLOCK_M=BLOCK_ROWS,
            num_warps=4,
            num_stages=2,
        )
    return out
