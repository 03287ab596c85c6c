"""What stands between the q, k, v projections and attention: bias, norms of the heads, rotary embedding.

    q, k, v = qkv + bias;  q, k = RMSNorm of each head (Qwen3);  q, k = rotated;  v as it is

The rotation (RoFormer, https://arxiv.org/abs/2104.09864) pairs column i of a head with column i + rotary_dim / 2,
as Transformers' rotate_half does. The backward pass undoes the three steps in one pass.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import say_once
from fourfold.kernels.low_rank import columns_refuse, new_extended, working_dtype

__all__ = ["rotary", "rotary_", "rotary_backward", "rotary_backward_reference", "rotary_reference"]

logger = logging.getLogger(__name__)

_OPTIONS = (
    "Tensor? cos, Tensor? sin, int num_heads, int num_kv_heads, Tensor? bias=None, Tensor? q_norm=None, "
    "Tensor? k_norm=None, float eps=0.0"
)
torch.library.define("fourfold::rotary", f"(Tensor qkv, {_OPTIONS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    "fourfold::rotary_",
    "(Tensor(a!) qkv, Tensor? cos, Tensor? sin, int num_heads, int num_kv_heads, Tensor? bias=None) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::rotary_backward",
    f"(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv_raw, {_OPTIONS}, int room=0) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_forward_op = torch.ops.fourfold.rotary.default
_inplace_op = torch.ops.fourfold.rotary_.default
_backward_op = torch.ops.fourfold.rotary_backward.default


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
    """Bias, norms of the heads and rotary embedding.

    Args:
        qkv: [M, N], N = (num_heads + 2 * num_kv_heads) * head_dim: heads of q, then of k, then of v; bf16, fp16 or
            fp32; last stride 1.
        cos: [T, rotary_dim], any float dtype, contiguous, T a divisor of M: row m takes cos[m % T]. The halves
            are equal, as Transformers makes them, and the first is read. Columns of a head behind rotary_dim
            pass unrotated. None rotates nothing.
        sin: As `cos`.
        num_heads: Heads of q.
        num_kv_heads: Heads of k, and of v.
        bias: [N] of qkv's dtype, or None.
        q_norm: [head_dim], the weight of the norm of q's heads (cast before it is multiplied by the weight, as
            Transformers' Qwen3RMSNorm does), or None.
        k_norm: Of k's heads, or None; both or neither.
        eps: Of the norms.

    Returns:
        Contiguous [M, N], qkv's dtype. The rotation is computed in fp32 and rounded once.
    """
    return cast(Tensor, _forward_op(qkv, cos, sin, num_heads, num_kv_heads, bias, q_norm, k_norm, eps))


def rotary_(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None = None,
) -> None:
    """`rotary` without norms, written over `qkv`."""
    _inplace_op(qkv, cos, sin, num_heads, num_kv_heads, bias)


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
    """Gradient of `rotary`'s input. Bias and norms are frozen.

    Args:
        dq: [M, num_heads * head_dim], the gradient of the rotated q; last stride 1.
        dk: [M, num_kv_heads * head_dim].
        dv: [M, num_kv_heads * head_dim].
        qkv_raw: [M, N], `rotary`'s input; needed with norms only.
        room: Columns behind the gradient that are left unwritten.

    The others are as in `rotary`.

    Returns:
        [M, N + room], dq's dtype, last stride 1: the gradient first.
    """
    heads = (num_heads, num_kv_heads)
    return cast(Tensor, _backward_op(dq, dk, dv, qkv_raw, cos, sin, *heads, bias, q_norm, k_norm, eps, room))


def _rotate(heads: Tensor, cos: Tensor | None, sin: Tensor | None, sign: int) -> Tensor:
    """Rotates [M, heads, head_dim] by the angle, or by its negative where `sign` is -1."""
    if cos is None or sin is None:
        return heads
    half = cos.shape[1] // 2
    repeats = heads.shape[0] // cos.shape[0]
    cosine = cos[:, :half].to(heads.dtype).repeat(repeats, 1)[:, None]
    sine = sign * sin[:, :half].to(heads.dtype).repeat(repeats, 1)[:, None]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], dim=-1)


def _with_bias(qkv: Tensor, bias: Tensor | None) -> Tensor:
    wide = qkv.to(working_dtype(qkv.dtype))
    return wide if bias is None else wide + bias.to(wide.dtype)


def rotary_reference(
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
    """`rotary` in PyTorch."""
    total = num_heads + 2 * num_kv_heads
    heads = _with_bias(qkv, bias).view(qkv.shape[0], total, -1)
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)

    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x
        rstd = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
        return (weight * (x * rstd).to(weight.dtype)).to(x.dtype)

    parts = [_rotate(normed(q, q_norm), cos, sin, 1), _rotate(normed(k, k_norm), cos, sin, 1), v]
    return torch.cat(parts, dim=1).to(qkv.dtype).view(qkv.shape)


def _rotary_inplace_reference(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None = None,
) -> None:
    qkv.copy_(rotary_reference(qkv, cos, sin, num_heads, num_kv_heads, bias))


def rotary_backward_reference(
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
    """`rotary_backward` in PyTorch."""
    dtype, rows = working_dtype(dq.dtype), dq.shape[0]
    grad_q = _rotate(dq.to(dtype).view(rows, num_heads, -1), cos, sin, -1)
    grad_k = _rotate(dk.to(dtype).view(rows, num_kv_heads, -1), cos, sin, -1)
    if qkv_raw is not None and q_norm is not None and k_norm is not None:
        raw = _with_bias(qkv_raw, bias).view(rows, num_heads + 2 * num_kv_heads, -1)

        def through_norm(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
            rstd = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
            normed, grad = x * rstd, grad * weight.to(dtype)
            return rstd * (grad - normed * (grad * normed).mean(dim=-1, keepdim=True))

        grad_q = through_norm(grad_q, raw[:, :num_heads], q_norm)
        grad_k = through_norm(grad_k, raw[:, num_heads : num_heads + num_kv_heads], k_norm)
    parts = [grad_q.reshape(rows, -1), grad_k.reshape(rows, -1), dv.to(dtype)]
    grad = torch.cat(parts, dim=1)
    out = new_extended(dq, rows, grad.shape[1], room)
    out[:, : grad.shape[1]] = grad
    return out


def _forward_cuda(
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
    refusal = columns_refuse(qkv, cos, sin)
    if refusal is not None:
        say_once(logger, f"the rotary embedding runs in PyTorch, slower than by its kernel: {refusal}")
        return rotary_reference(qkv, cos, sin, num_heads, num_kv_heads, bias, q_norm, k_norm, eps)
    from fourfold.kernels import rotary_triton

    return rotary_triton.rotary(qkv, cos, sin, num_heads, num_kv_heads, bias, q_norm, k_norm, eps)


def _inplace_cuda(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    bias: Tensor | None = None,
) -> None:
    refusal = columns_refuse(qkv, cos, sin)
    if refusal is not None:
        say_once(logger, f"the rotary embedding runs in PyTorch, slower than by its kernel: {refusal}")
        _rotary_inplace_reference(qkv, cos, sin, num_heads, num_kv_heads, bias)
        return
    from fourfold.kernels import rotary_triton

    rotary_triton.rotary_(qkv, cos, sin, num_heads, num_kv_heads, bias)


def _backward_cuda(
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
    heads, norms = (num_heads, num_kv_heads), (q_norm, k_norm)
    refusal = columns_refuse(dq, dk, dv, qkv_raw, cos, sin)
    if refusal is not None:
        say_once(logger, f"the rotary embedding's gradient runs in PyTorch, slower than by its kernel: {refusal}")
        return rotary_backward_reference(dq, dk, dv, qkv_raw, cos, sin, *heads, bias, *norms, eps, room)
    from fourfold.kernels import rotary_triton

    return rotary_triton.rotary_backward(dq, dk, dv, qkv_raw, cos, sin, *heads, bias, *norms, eps, room)


def _forward_fake(
    qkv: Tensor,
    _cos: Tensor | None,
    _sin: Tensor | None,
    _num_heads: int,
    _num_kv_heads: int,
    _bias: Tensor | None = None,
    _q_norm: Tensor | None = None,
    _k_norm: Tensor | None = None,
    _eps: float = 0.0,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _inplace_fake(
    _qkv: Tensor,
    _cos: Tensor | None,
    _sin: Tensor | None,
    _num_heads: int,
    _num_kv_heads: int,
    _bias: Tensor | None = None,
) -> None:
    return None


def _backward_fake(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    _qkv_raw: Tensor | None,
    _cos: Tensor | None,
    _sin: Tensor | None,
    _num_heads: int,
    _num_kv_heads: int,
    _bias: Tensor | None = None,
    _q_norm: Tensor | None = None,
    _k_norm: Tensor | None = None,
    _eps: float = 0.0,
    room: int = 0,
) -> Tensor:
    return new_extended(dq, dq.shape[0], dq.shape[1] + dk.shape[1] + dv.shape[1], room)


torch.library.impl("fourfold::rotary", "default", rotary_reference)
torch.library.impl("fourfold::rotary_", "default", _rotary_inplace_reference)
torch.library.impl("fourfold::rotary_backward", "default", rotary_backward_reference)
torch.library.impl("fourfold::rotary", "cuda", _forward_cuda)
torch.library.impl("fourfold::rotary_", "cuda", _inplace_cuda)
torch.library.impl("fourfold::rotary_backward", "cuda", _backward_cuda)
torch.library.register_fake("fourfold::rotary", _forward_fake)
torch.library.register_fake("fourfold::rotary_", _inplace_fake)
torch.library.register_fake("fourfold::rotary_backward", _backward_fake)
