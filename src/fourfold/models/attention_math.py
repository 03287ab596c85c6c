"""Attention by plain PyTorch operations, in any dtype and on any device: the reference of every other backend.

Forward, for one query i over the keys j that it may see (Vaswani et al. 2017, arXiv:1706.03762, eq. 1):

    s_ij = scale * q_i . k_j    lse_i = log(sum_j exp(s_ij))    p_ij = exp(s_ij - lse_i)    o_i = sum_j p_ij v_j

Backward from the same lse, so that the softmax is not differentiated again (Dao et al. 2022, arXiv:2205.14135, app. B):

    dv_j = sum_i p_ij do_i      dp_ij = do_i . v_j      ds_ij = p_ij (dp_ij - do_i . o_i)
    dq_i = scale * sum_j ds_ij k_j                      dk_j = scale * sum_i ds_ij q_i

16-bit inputs are computed in fp32 and rounded once, at the end. The scores of one layer are held whole: batch * heads *
seq * seq numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_mask", "document_ids", "math_backward", "math_forward"]


def document_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """The number of the document that each of ``total`` flattened tokens belongs to: int64 [total].

    Args:
        cu_seqlens: int32 [documents + 1], the first token of each document, and ``total`` at the end.
        total: batch * seq.
    """
    positions = torch.arange(total, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(positions, cu_seqlens[1:], right=True)


def causal_mask(batch: int, length: int, device: torch.device, cu_seqlens: Tensor | None, window: int | None) -> Tensor:
    """What each query may see, true where it may: bool [batch or 1, 1, 1, seq, seq].

    A query sees itself and what stands before it in its own document, of that the last ``window`` tokens.
    """
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions[None, :]
    seen = distance >= 0
    if window is not None:
        seen = seen & (distance < window)
    if cu_seqlens is None:
        return seen[None, None, None]
    ids = document_ids(cu_seqlens, batch * length).view(batch, 1, 1, length)
    return seen & (ids[..., :, None] == ids[..., None, :])


def math_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, cu_seqlens: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of q [batch, seq, heads, head_dim] over k, v [batch, seq, kv_heads, head_dim].

    Returns:
        out: [batch, seq, heads, head_dim], contiguous, in q's dtype.
        lse: log-sum-exp of each query's scores, [batch, heads, seq], fp32 (float64 for float64 inputs).
    """
    batch, length, heads = q.shape[:3]
    queries, keys, values = _grouped(q, k.shape[2]), _grouped(k, k.shape[2]), _grouped(v, v.shape[2])
    scores = (queries @ keys.mT).mul_(scale)
    scores.masked_fill_(~causal_mask(batch, length, q.device, cu_seqlens, window), float("-inf"))
    lse = torch.logsumexp(scores, dim=-1, keepdim=True)
    out = scores.sub_(lse).exp_() @ values
    return _ungrouped(out, q.dtype), lse.reshape(batch, heads, length)


def math_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, in their shapes and dtype; ``lse`` is the forward's [batch, heads, seq]."""
    batch, length, heads = q.shape[:3]
    kv_heads = k.shape[2]
    queries, keys, values = _grouped(q, kv_heads), _grouped(k, kv_heads), _grouped(v, kv_heads)
    grads, outs = _grouped(grad_out, kv_heads), _grouped(out, kv_heads)
    scores = (queries @ keys.mT).mul_(scale)
    scores.masked_fill_(~causal_mask(batch, length, q.device, cu_seqlens, window), float("-inf"))
    weights = scores.sub_(lse.view(batch, kv_heads, heads // kv_heads, length, 1)).exp_()
    grad_v = (weights.mT @ grads).sum(dim=2, keepdim=True)
    grad_scores = (grads @ values.mT).sub_((grads * outs).sum(dim=-1, keepdim=True)).mul_(weights).mul_(scale)
    grad_q = grad_scores @ keys
    grad_k = (grad_scores.mT @ queries).sum(dim=2, keepdim=True)
    return _ungrouped(grad_q, q.dtype), _ungrouped(grad_k, k.dtype), _ungrouped(grad_v, v.dtype)


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[batch, seq, heads, head_dim] as [batch, kv_heads, heads of one kv_head, seq, head_dim], fp32 or wider."""
    batch, length, heads, head_dim = x.shape
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    return wide.reshape(batch, length, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3).to(dtype).contiguous()
