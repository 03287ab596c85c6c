"""Blockwise quantization to the nearest code, each block scaled by its absmax."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import triton_refuses

__all__ = ["quantize_blockwise", "quantize_blockwise_reference", "serves"]

torch.library.define(
    "fourfold::quantize_blockwise",
    "(Tensor flat, Tensor thresholds, Tensor order, SymInt block_size) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.quantize_blockwise.default


def serves(flat: Tensor, block_size: int) -> bool:
    """Whether a kernel takes this; the operator serves everything, but the reference needs much more memory."""
    return flat.is_cuda and 8 <= block_size <= 4096 and block_size & (block_size - 1) == 0 and not triton_refuses(flat)


def quantize_blockwise(flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Quantize blocks of a flat tensor.

    Args:
        flat: fp32, fp16 or bf16 [n], finite.
        thresholds: fp32 [15] or [255], ascending: the middles between neighbouring code points.
        order: uint8 [16] or [256], the code of each code point in ascending order.
        block_size: Elements that share a scale; the last block may be short.

    Returns:
        Codes, uint8 [ceil(n / 2)] (the even element in the high nibble) or [n], and scales, fp32
        [ceil(n / block_size)]. With x = fp32(element * fp32(1 / absmax)), the code is that of as many thresholds as lie
        strictly below x.
    """
    return cast(tuple[Tensor, Tensor], _op(flat, thresholds, order, block_size))


def quantize_blockwise_reference(
    flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """`quantize_blockwise` in PyTorch."""
    num_blocks = -(-flat.numel() // block_size)
    blocks = flat.new_zeros(num_blocks * block_size, dtype=torch.float32)
    blocks[: flat.numel()] = flat
    blocks = blocks.view(num_blocks, block_size)
    absmax = blocks.abs().amax(dim=1)
    normalized = blocks * (1.0 / absmax.clamp_min(1e-38))[:, None]
    codes = order[torch.bucketize(normalized.view(-1)[: flat.numel()], thresholds, out_int32=True)]
    if order.numel() == 16:
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
        codes = (codes[0::2] << 4) | codes[1::2]
    return codes, absmax


def _on_gpu(flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    if not serves(flat, block_size):
        return quantize_blockwise_reference(flat, thresholds, order, block_size)
    from fourfold.kernels import encoding_triton

    return encoding_triton.quantize(flat, thresholds, order, block_size)


def _fake(flat: Tensor, thresholds: Tensor, order: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    num_codes = -(-flat.numel() // 2) if order.numel() == 16 else flat.numel()
    num_blocks = -(-flat.numel() // block_size)
    return flat.new_empty(num_codes, dtype=torch.uint8), flat.new_empty(num_blocks, dtype=torch.float32)


torch.library.impl("fourfold::quantize_blockwise", "default", quantize_blockwise_reference)
torch.library.impl("fourfold::quantize_blockwise", "cuda", _on_gpu)
torch.library.register_fake("fourfold::quantize_blockwise", _fake)
