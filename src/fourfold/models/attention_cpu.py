"""Attention where there is no GPU kernel: PyTorch's fused one for CPUs, and the reference on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.models.attention_math import causal_mask, math_backward, math_forward
from fourfold.models.attention_types import AttentionBackend, AttentionCase, AttentionState, Documents

__all__ = ["CPU", "MATH"]


def _cpu_refuses(case: AttentionCase) -> str | None:
    if case.device_type != "cpu":
        return "runs on CPUs only"
    return None


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, window: int | None
) -> tuple[Tensor, AttentionState]:
    mask = _additive_mask(q, documents, window)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), 0.0, mask is None, attn_mask=mask, scale=scale
    )
    return out.transpose(1, 2).contiguous(), AttentionState("cpu", lse)


def _cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    state: AttentionState,
    scale: float,
    documents: Documents | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _additive_mask(q, documents, window)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        grad_out.transpose(1, 2),
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        out.transpose(1, 2),
        state.lse,
        0.0,
        mask is None,
        attn_mask=mask,
        scale=scale,
    )
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


def _additive_mask(q: Tensor, documents: Documents | None, window: int | None) -> Tensor | None:
    """[batch, 1, seq, seq] in the dtype of q, 0 where a query may see and -inf elsewhere; None where all is causal."""
    if documents is None and window is None:
        return None
    batch, length = q.shape[:2]
    cu_seqlens = None if documents is None else documents.cu_seqlens
    seen = causal_mask(batch, length, q.device, cu_seqlens, window).expand(batch, 1, 1, length, length).squeeze(1)
    return torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, float("-inf"))


def _math_refuses(case: AttentionCase) -> str | None:
    return None


def _math_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, window: int | None
) -> tuple[Tensor, AttentionState]:
    cu_seqlens = None if documents is None else documents.cu_seqlens
    out, lse = math_forward(q, k, v, scale=scale, cu_seqlens=cu_seqlens, window=window)
    return out, AttentionState("math", lse)


def _math_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    state: AttentionState,
    scale: float,
    documents: Documents | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    cu_seqlens = None if documents is None else documents.cu_seqlens
    return math_backward(grad_out, q, k, v, out, state.lse, scale=scale, cu_seqlens=cu_seqlens, window=window)


CPU = AttentionBackend("cpu", _cpu_refuses, _cpu_forward, _cpu_backward)
MATH = AttentionBackend("math", _math_refuses, _math_forward, _math_backward)
