"""The attention kernels that PyTorch ships for NVIDIA GPUs, each as a forward and a backward called by themselves.

Autograd's attention hides the log-sum-exp, and runs its forward again where activations are recomputed. These rows call
the same ATen operators below autograd (``derivatives.yaml`` of PyTorch shows the calls), so that the caller holds the
output and the log-sum-exp and can run the backward alone.

cuDNN's variable-length attention is no row: PyTorch keeps it switched off (``torch.nn.attention.varlen``), its backward
has taken the longest document's length from head_dim, and it builds a new plan for each number of documents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.models.attention_types import AttentionBackend, AttentionCase, AttentionState, Documents

__all__ = ["CUDNN", "EFFICIENT", "FLASH"]

_CAUSAL_FROM_TOP_LEFT = 1  # custom_mask_type of aten._efficient_attention_forward


def _no_nvidia_gpu(case: AttentionCase) -> str | None:
    if case.device_type != "cuda" or torch.version.cuda is None:
        return "runs on NVIDIA GPUs only"
    return None


def _cudnn_refuses(case: AttentionCase) -> str | None:
    # The limits are those of can_use_cudnn_attention in PyTorch's sdp_utils.cpp.
    version = torch.backends.cudnn.version() or 0
    widest = 256 if case.capability == (9, 0) and version >= 91000 else 128
    if (reason := _no_nvidia_gpu(case)) is not None:
        return reason
    if case.capability < (8, 0) or version < 90000 or not torch.backends.cuda.cudnn_sdp_enabled():
        return "needs compute capability 8.0 and cuDNN 9, not switched off"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return "takes fp16 and bf16 only"
    if case.head_dim % 8 or case.head_dim > widest:
        return f"takes head_dim in steps of 8 up to {widest}"
    if case.documents or case.window is not None:
        return "takes whole rows only"
    if case.length % 64:
        return "builds a plan for each length it meets, slower than a step: lengths in steps of 64 only"
    if case.deterministic:
        return "is not deterministic"
    return None


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, window: int | None
) -> tuple[Tensor, AttentionState]:
    out, lse, _, _, _, _, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention.default(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, True, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), AttentionState("cudnn", lse, (seed, offset))


def _cudnn_backward(
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
    length = q.shape[1]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default(
        grad_out.transpose(1, 2),
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        out.transpose(1, 2),
        state.lse,
        *state.philox,
        None,  # attn_bias
        None,  # cum_seq_q
        None,  # cum_seq_k
        length,
        length,
        0.0,
        True,
        scale=scale,
    )
    return dq.transpose(1, 2).contiguous(), dk.transpose(1, 2).contiguous(), dv.transpose(1, 2).contiguous()


def _flash_refuses(case: AttentionCase) -> str | None:
    if (reason := _no_nvidia_gpu(case)) is not None:
        return reason
    if case.capability < (8, 0) or not torch.backends.cuda.is_flash_attention_available():
        return "needs compute capability 8.0 and a PyTorch built with it"
    if case.dtype not in (torch.float16, torch.bfloat16):
        return "takes fp16 and bf16 only"
    if case.head_dim % 8 or case.head_dim > 256:
        return "takes head_dim in steps of 8 up to 256"
    if 192 < case.head_dim <= 224 and case.capability not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return "has too little shared memory for the backward of head_dim 200 to 224"
    return None


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, window: int | None
) -> tuple[Tensor, AttentionState]:
    q_, k_, v_, cu_seqlens, length = _flash_layout(q, k, v, documents)
    out, lse, rng_state, unused, _ = torch.ops.aten._flash_attention_forward.default(
        q_,
        k_,
        v_,
        cu_seqlens,
        cu_seqlens,
        length,
        length,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out.contiguous().view(q.shape), AttentionState("flash", lse, (rng_state, unused))


def _flash_backward(
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
    q_, k_, v_, cu_seqlens, length = _flash_layout(q, k, v, documents)
    dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
        grad_out.view(q_.shape),
        q_,
        k_,
        v_,
        out.view(q_.shape),
        state.lse,
        cu_seqlens,
        cu_seqlens,
        length,
        length,
        0.0,
        True,
        *state.philox,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return dq.contiguous().view(q.shape), dk.contiguous().view(k.shape), dv.contiguous().view(v.shape)


def _flash_layout(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """q, k, v as the kernel wants them, [batch, seq, ...] or, for documents, [tokens, ...]; boundaries; longest."""
    if documents is None:
        return q, k, v, None, q.shape[1]
    return q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), documents.cu_seqlens, documents.max_length


def _efficient_refuses(case: AttentionCase) -> str | None:
    if (reason := _no_nvidia_gpu(case)) is not None:
        return reason
    if case.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return "takes fp16, bf16 and fp32 only"
    if case.dtype == torch.bfloat16 and case.capability < (8, 0):
        return "takes bf16 from compute capability 8.0 on"
    if case.head_dim % 8:
        return "takes head_dim in steps of 8"
    if case.deterministic:
        return "is not deterministic"
    return None


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, window: int | None
) -> tuple[Tensor, AttentionState]:
    q_, k_, v_, cu_seqlens, length = _efficient_layout(q, k, v, documents)
    out, lse, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward.default(
        q_,
        k_,
        v_,
        None,
        cu_seqlens,
        cu_seqlens,
        length,
        length,
        0.0,
        _CAUSAL_FROM_TOP_LEFT,
        True,
        scale=scale,
        window_size=window,
    )
    return out.contiguous().view(q.shape), AttentionState("efficient", lse, (seed, offset))


def _efficient_backward(
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
    q_, k_, v_, cu_seqlens, length = _efficient_layout(q, k, v, documents)
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward.default(
        grad_out.view(q_.shape),
        q_,
        k_,
        v_,
        None,
        out.view(q_.shape),
        cu_seqlens,
        cu_seqlens,
        length,
        length,
        state.lse,
        0.0,
        *state.philox,
        _CAUSAL_FROM_TOP_LEFT,
        False,
        scale=scale,
        window_size=window,
    )
    if k.shape[2] != q.shape[2]:  # one gradient for each query head: those of one kv head add up
        dk, dv = (x.unflatten(2, (k.shape[2], -1)).sum(dim=3) for x in (dk, dv))
    return dq.contiguous().view(q.shape), dk.contiguous().view(k.shape), dv.contiguous().view(v.shape)


def _efficient_layout(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """As `_flash_layout`, but documents stand in one row [1, tokens, ...], and each query head has its own k and v."""
    if k.shape[2] != q.shape[2]:
        repeats = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2)
    if documents is None:
        return q, k, v, None, q.shape[1]
    rows = [x.flatten(0, 1).unsqueeze(0) for x in (q, k, v)]
    return rows[0], rows[1], rows[2], documents.cu_seqlens, min(documents.max_length, rows[0].shape[1])


CUDNN = AttentionBackend("cudnn", _cudnn_refuses, _cudnn_forward, _cudnn_backward)
FLASH = AttentionBackend("flash", _flash_refuses, _flash_forward, _flash_backward)
EFFICIENT = AttentionBackend("efficient", _efficient_refuses, _efficient_forward, _efficient_backward)
