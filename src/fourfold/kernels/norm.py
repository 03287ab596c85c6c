"""RMSNorm (https://arxiv.org/abs/1910.07467), forward and backward, with room for low-rank columns.

    rstd = 1 / sqrt(mean(x²) + eps);  y = weight * round(x * rstd)

as Transformers' LlamaRMSNorm computes it: statistics in fp32, cast before the multiplication by the weight.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import say_once
from fourfold.kernels.low_rank import columns_refuse, new_extended, working_dtype

__all__ = [
    "add_rms_norm_",
    "add_rms_norm_reference_",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_backward_reference",
    "rms_norm_reference",
]

logger = logging.getLogger(__name__)

# What a program's registers hold of a row.
_MAX_WIDTH = 16384

torch.library.define(
    "fourfold::rms_norm",
    "(Tensor x, Tensor weight, float eps, int room=0) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::add_rms_norm_",
    "(Tensor x, Tensor(a!) y, Tensor weight, float eps, int room, Tensor(b!)? copy) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::rms_norm_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? residual_grad, Tensor(a!) out) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
_forward_op = torch.ops.fourfold.rms_norm.default
_add_op = torch.ops.fourfold.add_rms_norm_.default
_backward_op = torch.ops.fourfold.rms_norm_backward.default


def rms_norm(x: Tensor, weight: Tensor, eps: float, room: int = 0) -> tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension.

    Args:
        x: [M, K], bf16, fp16 or fp32; last stride 1.
        weight: [K] of x's dtype.
        eps: added to the mean square.
        room: How many unwritten columns stand behind the result.

    Returns:
        [M, K + room] of x's dtype, last stride 1: the normed rows; and fp32 [M], the reciprocal root mean squares
        (float64 for float64 inputs).
    """
    return cast("tuple[Tensor, Tensor]", _forward_op(x, weight, eps, room))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, room: int = 0) -> tuple[Tensor, Tensor]:
    """`rms_norm` in PyTorch."""
    wide = x.to(working_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(dim=1) + eps)
    out = new_extended(x, len(x), x.shape[1], room)
    torch.mul((wide * rstd[:, None]).to(x.dtype), weight, out=out[:, : x.shape[1]])
    return out, rstd


def add_rms_norm_(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, room: int = 0, copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + y, which is written over y.

    Args:
        x: [M, K], as in `rms_norm`, as are the others.
        y: [M, K] of x's dtype, last stride 1: becomes x + y, rounded.
        copy: [M, K] of x's dtype, last stride 1, becomes the same; None for none.

    Returns:
        What `rms_norm` of the new y returns.
    """
    return cast("tuple[Tensor, Tensor]", _add_op(x, y, weight, eps, room, copy))


def add_rms_norm_reference_(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, room: int = 0, copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm_` in PyTorch."""
    y += x
    if copy is not None:
        copy.copy_(y)
    return rms_norm_reference(y, weight, eps, room)


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of RMSNorm's input, added to the gradient that came past it. The weight is frozen.

    Args:
        grad: [M, K], the gradient of the normed rows; last stride 1.
        x: [M, K], the norm's input, as in `rms_norm`.
        weight: [K].
        rstd: fp32 [M], from `rms_norm`.
        residual_grad: [M, K] to add, of x's dtype, or None.
        out: [M, K] of x's dtype to write to, last stride 1; no memory of the other arguments.

    Returns:
        `out`, or a new tensor like it: the sum, rounded once.
    """
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _backward_op(grad, x, weight, rstd, residual_grad, out)
    return out


def rms_norm_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None, out: Tensor
) -> None:
    """What `rms_norm_backward` writes, in PyTorch."""
    dtype = working_dtype(x.dtype)
    normed = x.to(dtype) * rstd[:, None]
    grad_normed = grad.to(dtype) * weight.to(dtype)
    mean = (grad_normed * normed).mean(dim=1, keepdim=True)
    grad_x = rstd[:, None] * (grad_normed - normed * mean)
    if residual_grad is not None:
        grad_x += residual_grad.to(dtype)
    out.copy_(grad_x)


def _refusal(x: Tensor, *others: Tensor | None) -> str | None:
    if x.shape[1] > _MAX_WIDTH:
        return f"no kernel takes rows of more than {_MAX_WIDTH} numbers"
    return columns_refuse(x, *others)


def _forward_cuda(x: Tensor, weight: Tensor, eps: float, room: int = 0) -> tuple[Tensor, Tensor]:
    refusal = _refusal(x)
    if refusal is not None:
        say_once(logger, f"RMSNorm runs in PyTorch, slower than by its kernel: {refusal}")
        return rms_norm_reference(x, weight, eps, room)
    from fourfold.kernels import norm_triton

    return norm_triton.rms_norm(x, weight, eps, room)


def _add_cuda(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, room: int, copy: Tensor | None
) -> tuple[Tensor, Tensor]:
    refusal = _refusal(x, y, copy)
    if refusal is not None:
        say_once(logger, f"RMSNorm runs in PyTorch, slower than by its kernel: {refusal}")
        return add_rms_norm_reference_(x, y, weight, eps, room, copy)
    from fourfold.kernels import norm_triton

    return norm_triton.rms_norm(y, weight, eps, room, addend=x, copy=copy)


def _backward_cuda(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual_grad: Tensor | None, out: Tensor
) -> None:
    refusal = _refusal(x, grad, residual_grad, out)
    if refusal is not None:
        say_once(logger, f"RMSNorm's gradient runs in PyTorch, slower than by its kernel: {refusal}")
        rms_norm_backward_reference(grad, x, weight, rstd, residual_grad, out)
        return
    from fourfold.kernels import norm_triton

    norm_triton.rms_norm_backward(grad, x, weight, rstd, residual_grad, out)


def _forward_fake(x: Tensor, _weight: Tensor, _eps: float, room: int = 0) -> tuple[Tensor, Tensor]:
    extended = new_extended(x, x.shape[0], x.shape[1], room)
    return extended, x.new_empty(x.shape[0], dtype=working_dtype(x.dtype))


def _add_fake(
    _x: Tensor, y: Tensor, weight: Tensor, eps: float, room: int, _copy: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _forward_fake(y, weight, eps, room)


def _backward_fake(
    _grad: Tensor, _x: Tensor, _weight: Tensor, _rstd: Tensor, _residual_grad: Tensor | None, _out: Tensor
) -> None:
    return None


torch.library.impl("fourfold::rms_norm", "default", rms_norm_reference)
torch.library.impl("fourfold::add_rms_norm_", "default", add_rms_norm_reference_)
torch.library.impl("fourfold::add_rms_norm_", "cuda", _add_cuda)
torch.library.register_fake("fourfold::add_rms_norm_", _add_fake)
torch.library.impl("fourfold::rms_norm_backward", "default", rms_norm_backward_reference)
torch.library.impl("fourfold::rms_norm", "cuda", _forward_cuda)
torch.library.impl("fourfold::rms_norm_backward", "cuda", _backward_cuda)
torch.library.register_fake("fourfold::rms_norm", _forward_fake)
torch.library.register_fake("fourfold::rms_norm_backward", _backward_fake)
