"""Blockwise quantization in Triton: one launch reads the elements once and writes codes and scales."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import on_device

__all__ = ["TILE", "quantize"]

TILE = 4096


@triton.jit
def larger(left: tl.tensor, right: tl.tensor) -> tl.tensor:
    return tl.maximum(left, right)


@triton.jit
def nearest_codes(
    values: tl.tensor, reciprocal: tl.tensor, thresholds_ptr: tl.tensor, order_ptr: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """Codes (int32) by a binary search: the thresholds are few enough to stay in the L1 cache."""
    normalized = values * reciprocal
    rank = tl.full(normalized.shape, 0, tl.int32)
    for bit in tl.static_range(BITS):
        step = 2 ** (BITS - 1 - bit)
        rank += tl.where(tl.load(thresholds_ptr + rank + step - 1) < normalized, step, 0)
    return tl.load(order_ptr + rank).to(tl.int32)


@triton.jit
def quantize_kernel(
    codes_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    flat_ptr: tl.tensor,
    num_elements: tl.tensor,
    thresholds_ptr: tl.tensor,
    order_ptr: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    TILE: tl.constexpr = BLOCKS * BLOCK_SIZE
    start = tl.program_id(0).to(tl.int64) * TILE
    remaining = tl.minimum(num_elements - start, TILE).to(tl.int32)
    block = tl.arange(0, BLOCKS)[:, None]
    element = block * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    values = tl.load(flat_ptr + start + element, mask=element < remaining, other=0.0).to(tl.float32)
    absmax = tl.reduce(tl.abs(values), 1, larger)
    reciprocal = tl.div_rn(
        tl.full([BLOCKS], 1.0, tl.float32), tl.maximum(absmax, tl.full([BLOCKS], 1e-38, tl.float32))
    )[:, None]
    tl.store(
        absmax_ptr + start // BLOCK_SIZE + tl.arange(0, BLOCKS),
        absmax,
        mask=tl.arange(0, BLOCKS) * BLOCK_SIZE < remaining,
    )
    code = nearest_codes(values, reciprocal, thresholds_ptr, order_ptr, BITS=BITS)
    if BITS == 8:
        tl.store(codes_ptr + start + element, code.to(tl.uint8), mask=element < remaining)
    else:
        # An odd element at the end is packed with a code of zero.
        code = tl.where(element < remaining, code, 0)
        even, odd = tl.split(tl.reshape(code, [BLOCKS, BLOCK_SIZE // 2, 2]))
        byte = block * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
        tl.store(codes_ptr + start // 2 + byte, (even * 16 + odd).to(tl.uint8), mask=byte * 2 < remaining)


def quantize(flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`fourfold.kernels.encoding.quantize_blockwise` for what `serves` says."""
    num_elements = flat.numel()
    bits = 4 if order.numel() == 16 else 8
    codes = torch.empty(-(-num_elements * bits // 8), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(triton.cdiv(num_elements, block_size), dtype=torch.float32, device=flat.device)
    if num_elements == 0:
        return codes, absmax
    with on_device(flat):
        quantize_kernel[(triton.cdiv(num_elements, TILE),)](
            *(codes, absmax, flat.contiguous(), num_elements, thresholds, order),
            BITS=bits,
            BLOCK_SIZE=block_size,
            BLOCKS=TILE // block_size,
            num_warps=8,
            enable_fp_fusion=False,
        )
    return codes, absmax
