"""Products with the two small matrices of LoRA, and the columns by which they ride along with other operators.

LoRA (https://arxiv.org/abs/2106.09685) multiplies activations of thousands of columns by matrices of a few rows.
Such a product does almost no arithmetic: its cost is reading the activations once. Operators of the fused block
that write an activation therefore give it *extended*: [M, K + R], whose first K columns are the result and whose
last R are `result @ projection.T`, computed while the result is still on the chip.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import say_once, triton_refuses

__all__ = [
    "MAX_FUSED_RANK",
    "columns_refuse",
    "extend",
    "fill_columns",
    "fused",
    "low_rank_grad",
    "low_rank_grad_reference",
    "project",
    "project_reference",
    "working_dtype",
]

logger = logging.getLogger(__name__)

# Rows of a projection that fit beside an operator's own registers; above it, a GEMM fills the tensor cores anyway.
MAX_FUSED_RANK = 0

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

torch.library.define("fourfold::project", "(Tensor x, Tensor a) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define("fourfold::low_rank_grad", "(Tensor p, Tensor q) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "fourfold::low_rank_grad_", "(Tensor(a!) out, Tensor p, Tensor q) -> ()", tags=torch.Tag.pt2_compliant_tag
)
_project_op = torch.ops.fourfold.project.default
_grad_op = torch.ops.fourfold.low_rank_grad.default
_grad_into_op = torch.ops.fourfold.low_rank_grad_.default


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


def fused(projection: Tensor | None) -> Tensor | None:
    """`projection` where a kernel can take it along, None where there is none or its rank is too high."""
    return projection if projection is not None and projection.shape[0] <= MAX_FUSED_RANK else None


def fill_columns(extended: Tensor, width: int, projection: Tensor | None) -> None:
    """Writes columns `width:` of `extended` by a GEMM where the kernel that wrote the others did not."""
    if projection is not None and projection.shape[0] > MAX_FUSED_RANK:
        torch.mm(extended[:, :width], projection.t(), out=extended[:, width:])


def extend(result: Tensor, projection: Tensor | None) -> Tensor:
    """`result` [M, K] with the columns `result @ projection.T` behind it: contiguous [M, K + R], in PyTorch."""
    if projection is None:
        return result.contiguous()
    return torch.cat([result, project_reference(result, projection)], dim=1)


def project(x: Tensor, a: Tensor) -> Tensor:
    """`x @ a.T`, accumulated in fp32 and rounded once: the first product of a LoRA adapter.

    Args:
        x: [M, K], bf16, fp16 or fp32; last stride 1.
        a: [R, K] of x's dtype, any strides.

    Returns:
        [M, R], x's dtype, contiguous.
    """
    return cast(Tensor, _project_op(x, a))


def project_reference(x: Tensor, a: Tensor) -> Tensor:
    """`project` in PyTorch."""
    dtype = working_dtype(x.dtype)
    return (x.to(dtype) @ a.to(dtype).t()).to(x.dtype)


def low_rank_grad(p: Tensor, q: Tensor, out: Tensor | None = None) -> Tensor:
    """`p.T @ q` in fp32: the gradient of a LoRA matrix. The same inputs give the same bits each time.

    Args:
        p: [M, R], the narrow side; last stride 1.
        q: [M, N] of p's dtype, the wide side, read once; last stride 1.
        out: fp32 [R, N] to which the product is added, in place.

    Returns:
        fp32 [R, N] (float64 for float64 inputs): `out` where it is given.
    """
    if out is None:
        return cast(Tensor, _grad_op(p, q))
    _grad_into_op(out, p, q)
    return out


def low_rank_grad_reference(p: Tensor, q: Tensor) -> Tensor:
    """`low_rank_grad` in PyTorch, without `out`."""
    dtype = working_dtype(p.dtype)
    return p.to(dtype).t() @ q.to(dtype)


def _low_rank_grad_into_reference(out: Tensor, p: Tensor, q: Tensor) -> None:
    out += low_rank_grad_reference(p, q)


def _project_cuda(x: Tensor, a: Tensor) -> Tensor:
    if a.shape[0] > MAX_FUSED_RANK:
        return torch.mm(x, a.t())
    refusal = columns_refuse(x)
    if refusal is not None:
        say_once(logger, f"low-rank products run in PyTorch: {refusal}")
        return project_reference(x, a)
    from fourfold.kernels import low_rank_triton

    return low_rank_triton.project(x, a)


def _low_rank_grad_cuda(p: Tensor, q: Tensor) -> Tensor:
    refusal = columns_refuse(p, q)
    if refusal is not None:
        say_once(logger, f"low-rank gradients run in PyTorch: {refusal}")
        return low_rank_grad_reference(p, q)
    if p.shape[1] > MAX_FUSED_RANK:
        return torch.mm(p.t(), q) if p.dtype == torch.float32 else torch.mm(p.t(), q, out_dtype=torch.float32)
    from fourfold.kernels import low_rank_triton

    return low_rank_triton.low_rank_grad(p, q)


def _low_rank_grad_into_cuda(out: Tensor, p: Tensor, q: Tensor) -> None:
    if p.shape[1] > MAX_FUSED_RANK or columns_refuse(p, q, out) is not None:
        out += _low_rank_grad_cuda(p, q)
        return
    from fourfold.kernels import low_rank_triton

    low_rank_triton.low_rank_grad(p, q, out)


def _project_fake(x: Tensor, a: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], a.shape[0])


def _low_rank_grad_fake(p: Tensor, q: Tensor) -> Tensor:
    return p.new_empty(p.shape[1], q.shape[1], dtype=working_dtype(p.dtype))


def _low_rank_grad_into_fake(_out: Tensor, _p: Tensor, _q: Tensor) -> None:
    return None


torch.library.impl("fourfold::project", "default", project_reference)
torch.library.impl("fourfold::low_rank_grad", "default", low_rank_grad_reference)
torch.library.impl("fourfold::low_rank_grad_", "default", _low_rank_grad_into_reference)
torch.library.impl("fourfold::project", "cuda", _project_cuda)
torch.library.impl("fourfold::low_rank_grad", "cuda", _low_rank_grad_cuda)
torch.library.impl("fourfold::low_rank_grad_", "cuda", _low_rank_grad_into_cuda)
torch.library.register_fake("fourfold::project", _project_fake)
torch.library.register_fake("fourfold::low_rank_grad", _low_rank_grad_fake)
torch.library.register_fake("fourfold::low_rank_grad_", _low_rank_grad_into_fake)
