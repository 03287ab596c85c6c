"""Products with the two small matrices of LoRA, and the columns in which they stand beside what they are made of.

LoRA (https://arxiv.org/abs/2106.09685) multiplies activations of thousands of columns by matrices of a few rows.
Operators of the fused block that write an activation give it *extended*: [M, K + R], whose first K columns are the
result and whose last R are `result @ projection.T`, so that one matrix product takes both. The R columns are a GEMM of
their own: multiplied while the result is still on the chip, they cost more time than cuBLAS needs to read it again,
but for the widest of these tensors, the gated activation, and for the attention's output, which is copied anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.availability import triton_refuses

__all__ = [
    "beside",
    "columns_alone",
    "columns_refuse",
    "extend",
    "fill_columns",
    "low_rank_grad",
    "new_extended",
    "row_length",
    "with_room",
    "working_dtype",
]

# Elements to which rows of extended tensors are aligned: 128 bytes of 16-bit numbers, the lines in which the GPU's
# copies to shared memory are read. Rows of 4112 numbers make a matrix product 1.5 to 2% slower than rows of 4160.
_ROW_MULTIPLE = 64

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a reference computes: fp32 for 16-bit tensors, else the tensors' own."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def columns_refuse(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel of this package takes these activations; None if one does.

    All are on one device; each needs a last stride of 1 (a single column has none) and bf16, fp16 or fp32.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    for tensor in present:
        if tensor.dtype not in _KERNEL_DTYPES:
            return f"no kernel takes {tensor.dtype}"
        if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
            return "no kernel takes tensors whose last stride is not 1"
    return triton_refuses(present[0])


def new_extended(like: Tensor, num_rows: int, width: int, rank: int) -> Tensor:
    """An unwritten [num_rows, width + rank] of the dtype and device of `like`, last stride 1, its rows aligned."""
    return like.new_empty(num_rows, row_length(width, rank))[:, : width + rank]


def row_length(width: int, rank: int) -> int:
    """Elements from one row of an extended tensor to the next."""
    return -(-(width + rank) // _ROW_MULTIPLE) * _ROW_MULTIPLE if rank else width


def with_room(x: Tensor, rank: int) -> Tensor:
    """`x` [M, K] in new memory, [M, K + rank], with unwritten columns behind it; last stride 1."""
    extended = new_extended(x, x.shape[0], x.shape[1], rank)
    extended[:, : x.shape[1]] = x
    return extended


def fill_columns(extended: Tensor, width: int, projection: Tensor | None) -> None:
    """Writes columns `width:` of `extended` [M, width + R]: those before them times `projection.T`, [R, width]."""
    if projection is not None:
        torch.mm(extended[:, :width], projection.t(), out=extended[:, width:])


def extend(x: Tensor, projection: Tensor | None) -> Tensor:
    """`x` with the columns `x @ projection.T` behind it.

    Args:
        x: [M, K].
        projection: [R, K] of x's dtype, any strides, or None for R = 0.

    Returns:
        [M, K + R] of x's dtype, last stride 1; x itself where it is contiguous and R = 0.
    """
    if projection is None:
        return x.contiguous()
    extended = with_room(x, projection.shape[0])
    fill_columns(extended, x.shape[1], projection)
    return extended


def beside(x: Tensor, low: Tensor) -> Tensor:
    """`x` [M, K] with the columns `low` [M, R] behind it, in new memory, [M, K + R]; last stride 1."""
    extended = with_room(x, low.shape[1])
    extended[:, x.shape[1] :] = low
    return extended


def columns_alone(extended: Tensor, width: int) -> Tensor:
    """Columns `width:` of `extended` [M, width + R], contiguous, in memory of their own."""
    # Not `contiguous()`, which leaves no columns, and those of one row, where they are, and all beside them alive.
    return extended[:, width:].clone(memory_format=torch.contiguous_format)


def low_rank_grad(p: Tensor, q: Tensor, out: Tensor | None = None) -> Tensor:
    """`p.T @ q`, not rounded to 16 bits: the gradient of a LoRA matrix.

    Args:
        p: [M, R].
        q: [M, N] of p's dtype.
        out: [R, N] of the result's dtype, to which the product is added in place.

    Returns:
        fp32 [R, N] (float64 for float64 inputs): `out` where it is given.
    """
    # The meta device is asked what a GPU would hold.
    if p.device.type in ("cuda", "meta") and p.dtype in (torch.bfloat16, torch.float16):
        product = torch.mm(p.t(), q, out_dtype=torch.float32)
        return product if out is None else out.add_(product)
    dtype = working_dtype(p.dtype)
    left, right = p.to(dtype).t(), q.to(dtype)
    return left @ right if out is None else out.addmm_(left, right)
