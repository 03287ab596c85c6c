"""The gradient of LoRA's A: a sum over tokens, of the layer's input times what came back through B.

Where a norm is before the layer, its output need not be there: a row of it is the norm's input times a number, and a
column times another.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.low_rank import columns_refuse, low_rank_grad, working_dtype

__all__ = ["grad_a", "grad_a_reference"]

torch.library.define(
    "fourfold::grad_a",
    "(Tensor grad_low, Tensor x, Tensor? rstd=None, Tensor? norm=None, Tensor? before=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.grad_a.default

# What the kernel takes. Of more ranks, its parts of the sums would be as many bytes as the input; of fewer numbers,
# launches cost as much as reading them. fp32 has no tensor cores of its precision.
_MAX_RANK = 64
_MIN_ROWS, _MIN_WIDTH = 2048, 1024
_DTYPES = (torch.bfloat16, torch.float16)


def grad_a(
    grad_low: Tensor,
    x: Tensor,
    rstd: Tensor | None = None,
    norm: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """The gradient of A for the tokens of x, added to that for others.

        before + ((grad_low * rstd[:, None]).T @ x) * norm

    The first product is rounded to x's dtype, the sums are accumulated in fp32 and not rounded to 16 bits. In fp16,
    whose range the first product may leave, x is multiplied by rstd instead: it is then as large as a norm's output.

    Args:
        grad_low: [M, R] of x's dtype: the gradient of the layer's output times its scaled B; last stride 1.
        x: [M, K], the layer's input; or that of the RMSNorm before it, of which `rstd` and `norm` tell; last stride 1.
        rstd: Contiguous fp32 [M] (float64 for float64 inputs): the reciprocal root mean squares; None for ones.
        norm: [K], the norm's weight; None for ones.
        before: Contiguous, what this returned for other tokens; None for zeros.

    Returns:
        Contiguous fp32 [R, K] (float64 for float64 inputs), of memory of its own.
    """
    return cast(Tensor, _op(grad_low, x, rstd, norm, before))


def grad_a_reference(
    grad_low: Tensor,
    x: Tensor,
    rstd: Tensor | None = None,
    norm: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """`grad_a` in PyTorch."""
    if rstd is not None and x.dtype == torch.float16:
        x = torch.mul(x, rstd[:, None], out=x.new_empty(x.shape))
    elif rstd is not None:
        grad_low = torch.mul(grad_low, rstd[:, None], out=grad_low.new_empty(grad_low.shape))
    sums = low_rank_grad(grad_low, x)
    if norm is not None:
        sums *= norm
    if before is not None:
        sums += before
    return sums


def _cuda(
    grad_low: Tensor,
    x: Tensor,
    rstd: Tensor | None = None,
    norm: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    is_large = len(x) >= _MIN_ROWS and x.shape[1] >= _MIN_WIDTH
    is_taken = is_large and 0 < grad_low.shape[1] <= _MAX_RANK and x.dtype in _DTYPES
    # The kernel multiplies grad_low by rstd.
    is_in_range = rstd is None or x.dtype != torch.float16
    if is_taken and is_in_range and columns_refuse(x, grad_low, rstd, norm) is None:
        from fourfold.kernels import grad_a_triton

        return grad_a_triton.grad_a(grad_low, x, rstd, norm, before)
    return grad_a_reference(grad_low, x, rstd, norm, before)


def _fake(
    grad_low: Tensor,
    x: Tensor,
    _rstd: Tensor | None = None,
    _norm: Tensor | None = None,
    _before: Tensor | None = None,
) -> Tensor:
    return x.new_empty(grad_low.shape[1], x.shape[1], dtype=working_dtype(x.dtype))


torch.library.impl("fourfold::grad_a", "default", grad_a_reference)
torch.library.impl("fourfold::grad_a", "cuda", _cuda)
torch.library.register_fake("fourfold::grad_a", _fake)
