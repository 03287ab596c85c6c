"""Causal attention as two plain functions, a forward and a backward, over the fastest kernel that can run the case.

`attention_forward` returns the output and an `AttentionState`; `attention_backward` takes both back. Nothing is kept
elsewhere, so a caller may save, move or recompute them as it likes. `ATTENTION` lists the kernels in order of
preference; `choose_attention` takes the first that does not refuse, once for each kind of call.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fourfold.models.attention_cpu import CPU, MATH
from fourfold.models.attention_cuda import CUDNN, EFFICIENT, FLASH
from fourfold.models.attention_types import AttentionBackend, AttentionCase, AttentionState, Documents

__all__ = [
    "ATTENTION",
    "AttentionBackend",
    "AttentionCase",
    "AttentionState",
    "Documents",
    "attention_backward",
    "attention_forward",
    "choose_attention",
]

# In order of preference. cuDNN's is 1.7 to 1.8 times as fast as flash attention 2 on an H200.
ATTENTION: dict[str, AttentionBackend] = {row.name: row for row in (CUDNN, FLASH, EFFICIENT, CPU, MATH)}


@cache
def choose_attention(case: AttentionCase) -> AttentionBackend:
    """The first backend of `ATTENTION` that takes the case; "math" takes any."""
    return next(backend for backend in ATTENTION.values() if backend.refuses(case) is None)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, AttentionState]:
    """Causal attention, without autograd.

    Args:
        q: [batch, seq, heads, head_dim]; any strides, such as a part of one q, k, v buffer. The last dimension is
            contiguous, or the tensor is copied.
        k: [batch, seq, kv_heads, head_dim]; kv_heads divides heads.
        v: As k.
        scale: Factor of the scores, usually head_dim ** -0.5.
        documents: Boundaries of packed documents, which then do not see each other.
        window: How many tokens a query sees, itself among them (Transformers' ``sliding_window``); None for all.
        backend: A row of `ATTENTION` to use whether or not it refuses; None chooses.

    Returns:
        out: [batch, seq, heads, head_dim], contiguous, in q's dtype.
        state: What `attention_backward` needs beside q, k, v and out.
    """
    documents, window = _narrowest(q, documents, window)
    row = ATTENTION[backend] if backend is not None else choose_attention(_case(q, k, documents, window))
    return row.forward(_rows(q), _rows(k), _rows(v), scale, documents, window)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    state: AttentionState,
    *,
    scale: float,
    documents: Documents | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v by the backend of the forward; the other arguments are the forward's own.

    Args:
        grad_out: [batch, seq, heads, head_dim].

    Returns:
        dq, dk, dv: [batch, seq, heads or kv_heads, head_dim], each contiguous, in the dtype of q.
    """
    documents, window = _narrowest(q, documents, window)
    backward = ATTENTION[state.backend].backward
    return backward(grad_out.contiguous(), _rows(q), _rows(k), _rows(v), out, state, scale, documents, window)


def _narrowest(q: Tensor, documents: Documents | None, window: int | None) -> tuple[Documents | None, int | None]:
    """Leaves out boundaries and windows that forbid nothing, so that the faster kernels can run."""
    batch, length = q.shape[:2]
    if documents is not None and documents.are_rows(batch):
        documents = None
    if window is not None and window >= (length if documents is None else documents.max_length):
        window = None
    return documents, window


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _case(q: Tensor, k: Tensor, documents: Documents | None, window: int | None) -> AttentionCase:
    device = q.device
    return AttentionCase(
        device_type=device.type,
        capability=_capability(device) if device.type == "cuda" else (0, 0),
        dtype=q.dtype,
        length=q.shape[1],
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        head_dim=q.shape[3],
        documents=documents is not None,
        window=window,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
