"""Attention of a decode step: a token for each of some slots of a cache, from q, k and v as linear layers leave them.

    q, k = RMSNorm of each head (Qwen3);  q, k = rotated;  k, v written to the slot at the token's position;
    out = softmax(scale q k^T) v over the slot's tokens, the new one among them

What a row sees, its length, is read on the device, so that one CUDA graph serves all lengths. The length is shared out
among programs in parts of a fixed size, and another launch joins what they found.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import triton_refuses
from fourfold.kernels.decode_norm import to_operand
from fourfold.kernels.low_rank import working_dtype
from fourfold.kernels.rotary import rotary_reference

__all__ = ["decode_attention_", "decode_attention_reference_", "serves"]

torch.library.define(
    "fourfold::decode_attention_",
    "(Tensor qkv, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, Tensor slots, Tensor positions, "
    "float scale, int? window, Tensor? q_norm, Tensor? k_norm, float eps, bool as_operand) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.decode_attention_.default


def serves(qkv: Tensor, keys: Tensor) -> bool:
    """Whether a kernel takes this: heads of 16 to 256 numbers, a power of two; 16 bits."""
    head_dim = keys.shape[3]
    return (
        qkv.is_cuda
        and qkv.dtype == keys.dtype
        and qkv.dtype in (torch.bfloat16, torch.float16)
        and head_dim in (16, 32, 64, 128, 256)
        and keys.stride(3) == 1
        and triton_refuses(qkv) is None
    )


def decode_attention_(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    *,
    scale: float,
    window: int | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    as_operand: bool = False,
) -> Tensor:
    """Write the tokens' keys and values, and attend.

    Args:
        qkv: [M, (heads + 2 kv_heads) * head_dim], contiguous.
        cos, sin: [M, rotary_dim] of each row's position, contiguous, the halves equal, or None for no rotation.
        keys, values: [slots, kv_heads, length, head_dim] of qkv's dtype and like strides, the last one 1.
        slots: int64 [M], all different.
        positions: int64 [M]: where each row's token is written; the tokens before it are seen.
        scale: Factor of the scores.
        window: Tokens that a row sees, its own among them; None for all.
        q_norm, k_norm, eps: The heads' norms, as `rotary` takes them.
        as_operand: Whether the result is fp16, as `decode_linear` takes it.

    Returns:
        [M, heads * head_dim] of qkv's dtype, or fp16.
    """
    return cast(
        Tensor,
        _op(
            *(qkv, cos, sin, keys, values, slots, positions, scale, window),
            *(q_norm, k_norm, eps, as_operand),
        ),
    )


def decode_attention_reference_(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    scale: float,
    window: int | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    as_operand: bool,
) -> Tensor:
    """`decode_attention_` in PyTorch."""
    rows = len(qkv)
    kv_heads, length, head_dim = keys.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    rotated = rotary_reference(qkv, cos, sin, heads, kv_heads, None, q_norm, k_norm, eps)
    q, k, v = rotated.view(rows, -1, head_dim).split([heads, kv_heads, kv_heads], dim=1)
    keys[slots, :, positions] = k
    values[slots, :, positions] = v
    # On a GPU the length is not asked for: the host must not wait.
    seen = length if qkv.is_cuda else int(positions.max()) + 1
    columns = torch.arange(seen, device=qkv.device)
    mask = columns <= positions[:, None]
    if window is not None:
        mask &= columns > positions[:, None] - window
    wide = working_dtype(qkv.dtype)
    k_seen, v_seen = (held[slots, :, :seen].to(wide) for held in (keys, values))
    grouped = q.reshape(rows, kv_heads, -1, head_dim).to(wide)
    scores = grouped @ k_seen.transpose(2, 3) * scale
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    out = (scores.softmax(dim=-1) @ v_seen).reshape(rows, -1)
    rounded = out.to(qkv.dtype)
    return to_operand(rounded) if as_operand else rounded


def _cuda(qkv: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor, values: Tensor, *others: object) -> Tensor:
    if not serves(qkv, keys):
        return decode_attention_reference_(qkv, cos, sin, keys, values, *others)  # type: ignore[arg-type]
    from fourfold.kernels import decode_attention_triton

    return decode_attention_triton.decode_attention_(qkv, cos, sin, keys, values, *others)  # type: ignore[arg-type]


def _fake(
    qkv: Tensor, _cos: Tensor | None, _sin: Tensor | None, keys: Tensor, _values: Tensor, *others: object
) -> Tensor:
    width = qkv.shape[1] - 2 * keys.shape[1] * keys.shape[3]
    return qkv.new_empty(qkv.shape[0], width, dtype=torch.float16 if others[-1] else qkv.dtype)


torch.library.impl("fourfold::decode_attention_", "default", decode_attention_reference_)
torch.library.impl("fourfold::decode_attention_", "cuda", _cuda)
torch.library.register_fake("fourfold::decode_attention_", _fake)
