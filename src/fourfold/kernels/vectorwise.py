"""LLM.int8(): products with an int8 weight, whose input is rounded to int8 as well, all but its outlier columns.

Rows are scaled by their largest magnitude, those of W [N, K] once, those of x [M, K] (tokens) at each product:

    q[i, k] = round(127 x[i, k] / absmax[i])

A column of x in which a magnitude reaches the threshold is an outlier. It is left out of q, so that it does not spoil
the scales, and is multiplied as it is with the same column of the dequantized W:

    y = (q_x q_W^T) absmax_x absmax_W / 127^2 + x[:, outliers] W[:, outliers]^T

The first product is exact, in int32; the sum is formed in fp32 and rounded once.

Source: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale"
(https://arxiv.org/abs/2208.07339), sections 2 and 3; rounding as bitsandbytes does it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dequantize_rows", "int8_product", "matmul_vectorwise", "outlier_columns", "quantize_rows"]

_LARGEST = 127.0
# Below this the reciprocal of a scale is no fp32 number.
_SMALLEST = 1e-36
# Elements that are rounded at a time: bounds the temporary memory.
_PART = 2**24
# What cuBLAS asks of int8 products: more rows than 16, and widths in multiples of 8.
_FEWEST_ROWS, _MULTIPLE = 32, 8


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to int8.

    Args:
        x: fp32, fp16 or bf16 [..., K], K at least 1.

    Returns:
        int8 [..., K], from -127 to 127, and the rows' largest magnitudes, fp32 [product of the other dimensions].
    """
    flat = x.reshape(-1, x.shape[-1])
    absmax = torch.linalg.vector_norm(flat, math.inf, dim=1).float()
    inverse = (_LARGEST / absmax.clamp_min(_SMALLEST))[:, None]
    codes = torch.empty(flat.shape, dtype=torch.int8, device=x.device)
    rows = max(1, _PART // flat.shape[1])
    for part, scale, out in zip(flat.split(rows), inverse.split(rows), codes.split(rows), strict=True):
        out.copy_((part * scale).round_())
    return codes.view(x.shape), absmax


def dequantize_rows(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32(code * absmax / 127), rounded once: `codes`' shape in `dtype`.

    Args:
        codes: int8 [..., K].
        absmax: fp32, one a row.
        dtype: fp32, fp16 or bf16.
    """
    scale = (absmax / _LARGEST).view(*codes.shape[:-1], 1)
    dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    torch.mul(codes, scale, out=dense)
    return dense


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """int64: the columns of x [M, K] in which a magnitude is at least `threshold`; none at threshold 0.

    On a GPU the host waits for their number.
    """
    # A model that is followed on the meta device has no numbers, and so no outliers.
    if threshold <= 0 or x.is_meta:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    largest: Tensor = torch.linalg.vector_norm(x, math.inf, dim=0)
    return (largest >= threshold).nonzero().view(-1)


def int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of int8 [M, K] and [N, K]: int32 [M, N], or fp32 where the device multiplies no int8."""
    if x.is_cuda:
        rows, columns = weight.shape
        width = -columns % _MULTIPLE
        x = torch.nn.functional.pad(x, (0, width, 0, max(0, _FEWEST_ROWS - len(x))))[: max(len(x), _FEWEST_ROWS)]
        if width or rows % _MULTIPLE:
            weight = torch.nn.functional.pad(weight, (0, width, 0, -rows % _MULTIPLE))
        return _int_mm(x, weight)
    # Without AVX-512, PyTorch's int8 product is one element at a time. fp32 counts to 2^24, and rounds beyond that.
    is_fast = x.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    if is_fast or x.is_meta:
        return _int_mm(x, weight)
    product: Tensor = x.float() @ weight.float().t()
    return product


def _int_mm(x: Tensor, weight: Tensor) -> Tensor:
    sums: Tensor = torch._int_mm(x, weight.t())
    return sums


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left right^T, its sums in fp32 and not rounded."""
    if left.device.type in ("cuda", "meta") and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right.t(), out_dtype=torch.float32)
    return left.float() @ right.float().t()


def matmul_vectorwise(
    x: Tensor,
    codes: Tensor,
    absmax: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """x W^T + low up^T + b by LLM.int8().

    Args:
        x: fp32, fp16 or bf16 [..., K].
        codes, absmax: W [N, K], as `quantize_rows` gives it.
        threshold: From which magnitude a column of x is an outlier; 0: none is.
        bias: [N], or None.
        low, up: [..., rank] and [N, rank] in the dtype of x, multiplied in it; None without an adapter.

    Returns:
        [..., N] in the dtype of x.
    """
    num_rows, num_columns = codes.shape
    flat = x.reshape(-1, num_columns)
    num_tokens = len(flat)
    if not num_tokens:
        return x.new_zeros(*x.shape[:-1], num_rows)
    outliers = outlier_columns(flat, threshold)
    lefts, rights, inside = [], [], flat
    if outliers.numel():
        lefts.append(flat.index_select(1, outliers))
        rights.append(dequantize_rows(codes.index_select(1, outliers), absmax, x.dtype))
        inside = flat.index_fill(1, outliers, 0.0)
    if low is not None and up is not None:
        lefts.append(low.reshape(num_tokens, -1))
        rights.append(up)
    rounded, scales = quantize_rows(inside)
    sums = int8_product(rounded, codes)[:num_tokens, :num_rows]
    out = torch.mul(sums, (scales / _LARGEST)[:, None]).mul_(absmax / _LARGEST)
    if lefts:
        left, right = (lefts[0], rights[0]) if len(lefts) == 1 else (torch.cat(lefts, 1), torch.cat(rights, 1))
        out += _wide_product(left, right)
    if bias is not None:
        out += bias
    return out.to(x.dtype).view(*x.shape[:-1], num_rows)
