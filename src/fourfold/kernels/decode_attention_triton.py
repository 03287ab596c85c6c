"""Triton kernels of decode_attention.py.

A program has a row, a head of keys and values with all the query heads that share it, and one of the parts into which
the cache's length is shared out. It rotates its queries itself. Part 0 rotates the new key as well, writes it and the
new value, and counts them in; the others see only what was there before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.decode_norm_triton import to_operand
from fourfold.kernels.early_triton import AT_ONCE_ROWS, begin, wait
from fourfold.kernels.launching import cdiv, launches_early, next_power_of_2, on_device

__all__ = ["BLOCK_N", "decode_attention_", "part_size"]

# Keys that a program has at a time: a part has no fewer.
BLOCK_N = 64
# Parts at most: what the second launch adds up.
MAX_PARTS = 64
# Eight on each of 132 multiprocessors: fixed rather than asked of the GPU, so that the result is always the same.
PROGRAMS = 1056


def part_size(rows: int, kv_heads: int, length: int) -> int:
    """Keys of a part: as many as leave PROGRAMS programs, since those behind a row's length have nothing to do."""
    wanted = min(MAX_PARTS, max(1, PROGRAMS // (rows * kv_heads)))
    return max(BLOCK_N, next_power_of_2(cdiv(length, wanted)))


@triton.jit
def rotated(
    x_ptr: tl.tensor,
    heads: tl.tensor,
    is_head: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    eps: tl.tensor,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
) -> tl.tensor:
    """Heads [H] of a row, [H, D], normed and rotated in fp32, and rounded once."""
    d = tl.arange(0, D)
    HALF: tl.constexpr = ROTARY // 2
    # The element that each is rotated with, and the sign of the sine.
    partner = tl.where(d < HALF, d + HALF, d - HALF)
    partner = tl.where(d < ROTARY, partner, d)
    at = heads[:, None] * D
    mask = is_head[:, None]
    x = tl.load(x_ptr + (at + d[None, :]), mask=mask, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + (at + partner[None, :]), mask=mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / D + eps)
        weight = tl.load(norm_ptr + d)
        weight_other = tl.load(norm_ptr + partner)
        dtype = x_ptr.dtype.element_ty
        x = (x * rstd[:, None]).to(dtype).to(tl.float32) * weight.to(tl.float32)[None, :]
        other = (other * rstd[:, None]).to(dtype).to(tl.float32) * weight_other.to(tl.float32)[None, :]
        x = x.to(dtype).to(tl.float32)
        other = other.to(dtype).to(tl.float32)
    if cos_ptr is not None:
        turns = d < ROTARY
        column = tl.where(d < HALF, d, d - HALF)
        cos = tl.load(cos_ptr + column, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + column, mask=turns, other=0.0).to(tl.float32)
        sin = tl.where(d < HALF, -sin, sin)
        x = x * cos[None, :] + other * sin[None, :]
    return x.to(x_ptr.dtype.element_ty)


@triton.jit
def cached(
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    base: tl.tensor,
    token_stride: tl.tensor,
    tokens: tl.tensor,
    first_seen: tl.tensor,
    end: tl.tensor,
    D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Keys [D, N] and values [N, D] of tokens [N] of a slot's head, zeros before `first_seen` and from `end` on; and
    [N] which are between."""
    is_seen = (tokens < end) & (tokens >= first_seen)
    d = tl.arange(0, D)
    at = base + tokens.to(tl.int64) * token_stride
    keys = tl.load(keys_ptr + (at[None, :] + d[:, None]), mask=is_seen[None, :], other=0.0)
    values = tl.load(values_ptr + (at[:, None] + d[None, :]), mask=is_seen[:, None], other=0.0)
    return keys, values, is_seen


@triton.jit
def attended(
    largest: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    is_seen: tl.tensor,
    scale: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The largest score, the sum of exponentials and the weighted values so far, with a block of tokens counted in."""
    scores = tl.where(is_seen[None, :], tl.dot(q, keys) * scale, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, axis=1))
    # A block of which nothing is seen leaves all as it was.
    safe = tl.where(now == float("-inf"), 0.0, now)
    shrink = tl.exp2(largest - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * shrink + tl.sum(weights, axis=1)
    return now, total, tl.dot(weights.to(values.dtype), values, sums * shrink[:, None])


@triton.jit
def decode_attention_kernel(
    sums_ptr: tl.tensor,  # fp32 [M, heads, parts, D]
    stats_ptr: tl.tensor,  # fp32 [M, heads, parts, 2]: largest score, sum of exponentials
    qkv_ptr: tl.tensor,  # [M, (heads + 2 kv_heads) D]
    cos_ptr: tl.tensor,  # [M, ROTARY] or None
    sin_ptr: tl.tensor,
    keys_ptr: tl.tensor,  # [slots, kv_heads, length, D]
    values_ptr: tl.tensor,
    slots_ptr: tl.tensor,  # int64 [M]
    positions_ptr: tl.tensor,  # int64 [M]
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    token_stride: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    eps: tl.tensor,
    part_size: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EARLY: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """window: 0 for none. BLOCK_G: heads of a group, at least 16 for the tensor cores."""
    begin(EARLY, AT_ONCE)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    part = tl.program_id(0)
    kv_head = tl.program_id(1)
    m = tl.program_id(2)
    num_parts = tl.num_programs(0)
    # These, and what the cache holds of the tokens before, are there since before the launch that this one waits for.
    position = tl.load(positions_ptr + m).to(tl.int32)
    slot = tl.load(slots_ptr + m)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, D)
    n = tl.arange(0, BLOCK_N)
    base = slot * slot_stride + kv_head * head_stride
    first_seen = 0
    if window > 0:
        first_seen = tl.maximum(position + 1 - window, 0)
    start = tl.maximum(part * part_size, first_seen // BLOCK_N * BLOCK_N)
    end = tl.minimum((part + 1) * part_size, position)
    if AT_ONCE:
        first = cached(keys_ptr, values_ptr, base, token_stride, start + n, first_seen, end, D)
    wait(EARLY, AT_ONCE)
    row_ptr = qkv_ptr + m * ((HEADS + 2 * KV_HEADS) * D)
    if cos_ptr is not None:
        cos_ptr += m * ROTARY
        sin_ptr += m * ROTARY
    # All are on their way together, though part 0 alone has use for the new key and value.
    q = rotated(row_ptr, kv_head * GROUP + g, g < GROUP, cos_ptr, sin_ptr, q_norm_ptr, eps, D, ROTARY)
    one = tl.arange(0, 1)
    new_k = rotated(row_ptr, HEADS + kv_head + one, one < 1, cos_ptr, sin_ptr, k_norm_ptr, eps, D, ROTARY)
    new_v = tl.load(row_ptr + ((HEADS + KV_HEADS + kv_head) * D + one[:, None] + d[None, :]))
    # Powers of two: the scores are divided by log(2).
    scale *= 1.4426950408889634
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.full([BLOCK_G], 0.0, tl.float32)
    sums = tl.full([BLOCK_G, D], 0.0, tl.float32)
    if part == 0:
        at = base + position.to(tl.int64) * token_stride + one[:, None] + d[None, :]
        tl.store(keys_ptr + at, new_k)
        tl.store(values_ptr + at, new_v)
        largest = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
        total += 1.0
        sums += new_v.to(tl.float32)
    if AT_ONCE and start < end:
        largest, total, sums = attended(largest, total, sums, q, *first, scale)
        start += BLOCK_N
    for block in range(start, end, BLOCK_N):
        held = cached(keys_ptr, values_ptr, base, token_stride, block + n, first_seen, end, D)
        largest, total, sums = attended(largest, total, sums, q, *held, scale)
    head = kv_head * GROUP + g
    place = (m * HEADS + head) * num_parts + part
    tl.store(sums_ptr + (place[:, None] * D + d[None, :]), sums, mask=(g < GROUP)[:, None])
    tl.store(stats_ptr + place * 2, largest, mask=g < GROUP)
    tl.store(stats_ptr + place * 2 + 1, total, mask=g < GROUP)


@triton.jit
def join_parts_kernel(
    out_ptr: tl.tensor,  # [M, heads, D]
    sums_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    num_parts: tl.tensor,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    DTYPE: tl.constexpr,
    EARLY: tl.constexpr,
    AT_ONCE: tl.constexpr,
) -> None:
    """A program has a head of a row. Rounded to DTYPE, whatever `out` is."""
    begin(EARLY, AT_ONCE)
    head = tl.program_id(0)
    d = tl.arange(0, D)
    p = tl.arange(0, BLOCK_P)
    is_part = p < num_parts
    wait(EARLY, AT_ONCE)
    at = head * num_parts + p
    largest = tl.load(stats_ptr + at * 2, mask=is_part, other=float("-inf"))
    total = tl.load(stats_ptr + at * 2 + 1, mask=is_part, other=0.0)
    # Part 0 has the new token, so there is a largest.
    weight = tl.exp2(largest - tl.max(largest, axis=0))
    seen = is_part & (total > 0.0)
    sums = tl.load(sums_ptr + (at[:, None] * D + d[None, :]), mask=seen[:, None], other=0.0)
    out = tl.sum(sums * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    out = out.to(DTYPE)
    if out_ptr.dtype.element_ty != DTYPE:
        out = to_operand(out.to(tl.float32))
    tl.store(out_ptr + (head * D + d), out)


def decode_attention_(
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
    size: int | None = None,
    early: bool | None = None,
) -> Tensor:
    """`fourfold.kernels.decode_attention.decode_attention_` for what `serves` says; `size`: of a part."""
    rows = len(qkv)
    kv_heads, length, head_dim = keys.shape[1:]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    size = size or part_size(rows, kv_heads, length)
    parts = cdiv(length, size)
    sums = torch.empty(rows, heads, parts, head_dim, dtype=torch.float32, device=qkv.device)
    stats = torch.empty(rows, heads, parts, 2, dtype=torch.float32, device=qkv.device)
    out = torch.empty(rows, heads * head_dim, dtype=torch.float16 if as_operand else qkv.dtype, device=qkv.device)
    early = launches_early(qkv.device) if early is None else early
    with on_device(qkv):
        decode_attention_kernel[(parts, kv_heads, rows)](
            *(sums, stats, qkv, cos, sin, keys, values, slots, positions, q_norm, k_norm),
            *(*keys.stride()[:3], float(scale), window or 0, float(eps), size),
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=head_dim,
            ROTARY=0 if cos is None else cos.shape[1],
            BLOCK_G=max(16, next_power_of_2(heads // kv_heads)),
            BLOCK_N=BLOCK_N,
            EARLY=early,
            AT_ONCE=rows <= AT_ONCE_ROWS,
            # Few programs have the GPU to themselves.
            num_warps=8 if rows <= AT_ONCE_ROWS else 4,
            num_stages=2,
            launch_pdl=early,
        )
        join_parts_kernel[(rows * heads,)](
            *(out, sums, stats, parts),
            D=head_dim,
            BLOCK_P=next_power_of_2(parts),
            DTYPE=tl.bfloat16 if qkv.dtype == torch.bfloat16 else tl.float16,
            EARLY=early,
            AT_ONCE=rows <= AT_ONCE_ROWS,
            num_warps=max(1, min(4, head_dim // 32)),
            launch_pdl=early,
        )
    return out
