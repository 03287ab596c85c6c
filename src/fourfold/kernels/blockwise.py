"""Blockwise dequantization: the operators' schemas and their PyTorch references.

A quantized tensor is a flat row of codes. Blocks of `block_size` consecutive codes share one scale, `absmax`,
and a code is an index into a codebook, so that element i is

    fp32(codebook[code[i]] * absmax[i // block_size]), rounded once to the wanted dtype.

A codebook of 16 entries means 4-bit codes, two to a byte, the even element in the high nibble; one of 256
entries means one byte a code. Scales may be quantized themselves (double quantization, QLoRA,
https://arxiv.org/abs/2305.14314, section 3): then, with two roundings,

    absmax[b] = fp32(map[q[b]] * nested_absmax[b // nested_block_size]) + offset.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import say_once, triton_refuses

__all__ = [
    "dequantize_blockwise",
    "dequantize_blockwise_reference",
    "dequantize_nested",
    "dequantize_nested_reference",
    "dequantize_scales",
    "dequantize_scales_reference",
    "says_no_kernel",
]

logger = logging.getLogger(__name__)


@functools.lru_cache(maxsize=64)
def _pair_table(codebook_values: tuple[float, ...], device: torch.device) -> Tensor:
    """float64[256] whose entry `byte` holds the bits of the two fp32 values that its nibbles stand for."""
    codebook = torch.tensor(codebook_values, dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    # One gather of eight bytes instead of two of four is what makes the reference fast enough for the CPU.
    return torch.stack([codebook[byte >> 4], codebook[byte & 15]], dim=1).view(torch.float64).reshape(-1)


def _decode(codes: Tensor, codebook: Tensor, num_elements: int) -> Tensor:
    """Codebook values of `codes`, fp32 [num_elements]."""
    flat = codes.reshape(-1)
    if codebook.numel() == 256:
        return codebook.index_select(0, flat.int())
    # A codebook is one of a few constants of 16 numbers, so reading it back as a key is cheap on the CPU; on
    # a GPU the read would synchronise, and two small gathers are used instead.
    if codebook.device.type == "cpu":
        table = _pair_table(tuple(codebook.tolist()), codebook.device)
        return table.index_select(0, flat.int()).view(torch.float32)[:num_elements]
    nibbles = torch.stack([flat >> 4, flat & 15], dim=1).reshape(-1)[:num_elements]
    return codebook.index_select(0, nibbles.int())


# Defined by schema rather than by torch.library.custom_op, whose Python layers take 13 microseconds a call
# instead of 5: a small weight is dequantized in 7.
torch.library.define(
    "fourfold::dequantize_blockwise",
    "(Tensor codes, Tensor codebook, Tensor absmax, SymInt block_size, SymInt[] shape, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::dequantize_scales",
    "(Tensor codes, Tensor code_map, Tensor nested_absmax, Tensor offset, SymInt nested_block_size) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::dequantize_nested",
    "(Tensor codes, Tensor codebook, Tensor scale_codes, Tensor code_map, Tensor nested_absmax, Tensor offset, "
    "SymInt block_size, SymInt nested_block_size, SymInt[] shape, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_blockwise_op = torch.ops.fourfold.dequantize_blockwise.default
_scales_op = torch.ops.fourfold.dequantize_scales.default
_nested_op = torch.ops.fourfold.dequantize_nested.default


def dequantize_blockwise(
    codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """Dequantize blockwise codes.

    Args:
        codes: uint8, two codes a byte for a codebook of 16, one for a codebook of 256; any shape.
        codebook: fp32 [16] or [256].
        absmax: fp32 [ceil(n / block_size)], n the product of `shape`.
        block_size: elements that share a scale; the last block may be short.
        shape: shape of the result.
        dtype: fp32, fp16 or bf16; the product is formed in fp32 and rounded once.

    Returns:
        Tensor of `shape` and `dtype`.
    """
    return cast(Tensor, _blockwise_op(codes, codebook, absmax, block_size, shape, dtype))


def dequantize_blockwise_reference(
    codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    """`dequantize_blockwise` in PyTorch: what a kernel must equal bit for bit, or else what runs."""
    num_elements = math.prod(shape)
    values = _decode(codes, codebook, num_elements)
    out = torch.empty(num_elements, dtype=dtype, device=codes.device)
    whole = num_elements // block_size
    body = whole * block_size
    torch.mul(values[:body].view(whole, block_size), absmax[:whole, None], out=out[:body].view(whole, block_size))
    if body < num_elements:
        torch.mul(values[body:], absmax[whole], out=out[body:])
    return out.view(shape)


def _blockwise_fake(
    codes: Tensor, _codebook: Tensor, _absmax: Tensor, _block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def dequantize_scales(
    codes: Tensor, code_map: Tensor, nested_absmax: Tensor, offset: Tensor, nested_block_size: int
) -> Tensor:
    """Scales of a double-quantized tensor.

    Args:
        codes: uint8 [num_blocks].
        code_map: fp32 [256], the signed dynamic map.
        nested_absmax: fp32 [ceil(num_blocks / nested_block_size)].
        offset: fp32 scalar, the mean that was taken off before quantizing.
        nested_block_size: scales that share one nested scale.

    Returns:
        fp32 [num_blocks]. Multiplication and addition round separately, as bitsandbytes does it: a fused
        multiply-add would change one scale in eight by its last bit.
    """
    return cast(Tensor, _scales_op(codes, code_map, nested_absmax, offset, nested_block_size))


def dequantize_scales_reference(
    codes: Tensor, code_map: Tensor, nested_absmax: Tensor, offset: Tensor, nested_block_size: int
) -> Tensor:
    """`dequantize_scales` in PyTorch."""
    scales = dequantize_blockwise(codes, code_map, nested_absmax, nested_block_size, list(codes.shape), torch.float32)
    return scales + offset


def _scales_fake(
    codes: Tensor, _code_map: Tensor, _nested_absmax: Tensor, _offset: Tensor, _nested_block_size: int
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def dequantize_nested(
    codes: Tensor,
    codebook: Tensor,
    scale_codes: Tensor,
    code_map: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    nested_block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize_scales` and `dequantize_blockwise` at once, with their arguments: on a GPU, one launch."""
    return cast(
        Tensor,
        _nested_op(
            *(codes, codebook, scale_codes, code_map, nested_absmax, offset),
            *(block_size, nested_block_size, shape, dtype),
        ),
    )


def dequantize_nested_reference(
    codes: Tensor,
    codebook: Tensor,
    scale_codes: Tensor,
    code_map: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    nested_block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize_nested` by the two operators that it joins."""
    absmax = dequantize_scales(scale_codes, code_map, nested_absmax, offset, nested_block_size)
    return dequantize_blockwise(codes, codebook, absmax, block_size, shape, dtype)


def _nested_fake(
    codes: Tensor,
    _codebook: Tensor,
    _scale_codes: Tensor,
    _code_map: Tensor,
    _nested_absmax: Tensor,
    _offset: Tensor,
    _block_size: int,
    _nested_block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def says_no_kernel(codes: Tensor, codebook: Tensor, block_size: int, nested_block_size: int = 1) -> bool:
    """Whether no Triton kernel decodes such a tensor; logs, once, why."""
    reason = triton_refuses(codes)
    if reason is None and codebook.numel() not in (16, 256):
        reason = f"a codebook of {codebook.numel()} entries is neither of 4 bits nor of 8"
    for size, least in ((block_size, 8), (nested_block_size, 1)):
        if reason is None and (size < least or size & (size - 1)):
            reason = f"blocks of {size} are not a power of two of at least {least}"
    if reason is not None:
        say_once(logger, f"weights are dequantized by PyTorch, slower than by a kernel: {reason}")
    return reason is not None


def _blockwise_on_gpu(
    codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int, shape: list[int], dtype: torch.dtype
) -> Tensor:
    if says_no_kernel(codes, codebook, block_size):
        return dequantize_blockwise_reference(codes, codebook, absmax, block_size, shape, dtype)
    from fourfold.kernels import blockwise_triton

    return blockwise_triton.dequantize(codes, codebook, absmax, block_size, shape, dtype)


def _nested_on_gpu(
    codes: Tensor,
    codebook: Tensor,
    scale_codes: Tensor,
    code_map: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    nested_block_size: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    if says_no_kernel(codes, codebook, block_size, nested_block_size):
        absmax = dequantize_scales_reference(scale_codes, code_map, nested_absmax, offset, nested_block_size)
        return dequantize_blockwise_reference(codes, codebook, absmax, block_size, shape, dtype)
    from fourfold.kernels import blockwise_triton

    nested = blockwise_triton.NestedParts(code_map, nested_absmax, offset, nested_block_size)
    return blockwise_triton.dequantize(codes, codebook, scale_codes, block_size, shape, dtype, nested)


# "default" serves every device that has no kernel of its own.
torch.library.impl("fourfold::dequantize_blockwise", "default", dequantize_blockwise_reference)
torch.library.impl("fourfold::dequantize_scales", "default", dequantize_scales_reference)
torch.library.register_fake("fourfold::dequantize_blockwise", _blockwise_fake)
torch.library.register_fake("fourfold::dequantize_scales", _scales_fake)
torch.library.impl("fourfold::dequantize_nested", "default", dequantize_nested_reference)
torch.library.register_fake("fourfold::dequantize_nested", _nested_fake)
torch.library.impl("fourfold::dequantize_blockwise", "cuda", _blockwise_on_gpu)
torch.library.impl("fourfold::dequantize_nested", "cuda", _nested_on_gpu)
