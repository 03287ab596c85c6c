"""What stands before the linear layers of a decode step: RMSNorm, and the adapters' x A^T beside it.

The kernels of `decode_linear` take activations as fp16, whatever the model computes in: fp16 holds every bf16 number
between 2^-14 and 2^16 as it is, and smaller ones to within 2^-25.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import triton_refuses
from fourfold.kernels.low_rank import working_dtype
from fourfold.kernels.norm import rms_norm_reference

__all__ = [
    "OPERAND",
    "decode_norm",
    "decode_norm_reference",
    "low_products",
    "low_products_reference",
    "to_operand",
]

OPERAND = torch.float16
# A row has to fit a program's registers.
_MAX_WIDTH = 32768

torch.library.define(
    "fourfold::decode_norm",
    "(Tensor x, Tensor weight, float eps, Tensor? lora_a) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::low_products",
    "(Tensor x, Tensor lora_a, float x_scale, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_norm_op = torch.ops.fourfold.decode_norm.default
_low_op = torch.ops.fourfold.low_products.default


def to_operand(x: Tensor) -> Tensor:
    """As fp16, where it is too large its largest number."""
    most = torch.finfo(OPERAND).max
    # In bf16 the largest number would be rounded up.
    return x.to(working_dtype(x.dtype)).clamp(-most, most).to(OPERAND)


def decode_norm(x: Tensor, weight: Tensor, eps: float, lora_a: Tensor | None) -> tuple[Tensor, Tensor]:
    """RMSNorm as `rms_norm` computes it, and its product with the A of adapters.

    Args:
        x: [M, K], contiguous, bf16 or fp16, as are the others.
        weight: [K].
        eps: Added to the mean square.
        lora_a: [R, K], contiguous, or None for R = 0.

    Returns:
        fp16 [M, K], and [M, R] of x's dtype, summed in fp32.
    """
    return cast("tuple[Tensor, Tensor]", _norm_op(x, weight, eps, lora_a))


def decode_norm_reference(x: Tensor, weight: Tensor, eps: float, lora_a: Tensor | None) -> tuple[Tensor, Tensor]:
    """`decode_norm` in PyTorch."""
    normed, _ = rms_norm_reference(x, weight, eps)
    if lora_a is None:
        return to_operand(normed), x.new_empty(len(x), 0)
    wide = working_dtype(x.dtype)
    return to_operand(normed), (normed.to(wide) @ lora_a.to(wide).T).to(x.dtype)


def low_products(x: Tensor, lora_a: Tensor, x_scale: float, dtype: torch.dtype) -> Tensor:
    """x_scale * x A^T, summed in fp32.

    Args:
        x: fp16 [M, K], contiguous.
        lora_a: [R, K] of `dtype`, contiguous.
        x_scale: What x was divided by.
        dtype: Of the result, [M, R].
    """
    return cast(Tensor, _low_op(x, lora_a, x_scale, dtype))


def low_products_reference(x: Tensor, lora_a: Tensor, x_scale: float, dtype: torch.dtype) -> Tensor:
    """`low_products` in PyTorch."""
    wide = working_dtype(x.dtype)
    return ((x.to(wide) * x_scale) @ lora_a.to(wide).T).to(dtype)


def _norm_cuda(x: Tensor, weight: Tensor, eps: float, lora_a: Tensor | None) -> tuple[Tensor, Tensor]:
    if triton_refuses(x) is not None or x.shape[1] > _MAX_WIDTH:
        return decode_norm_reference(x, weight, eps, lora_a)
    from fourfold.kernels import decode_norm_triton

    return decode_norm_triton.decode_norm(x, weight, eps, lora_a)


def _low_cuda(x: Tensor, lora_a: Tensor, x_scale: float, dtype: torch.dtype) -> Tensor:
    if triton_refuses(x) is not None or x.shape[1] > _MAX_WIDTH:
        return low_products_reference(x, lora_a, x_scale, dtype)
    from fourfold.kernels import decode_norm_triton

    return decode_norm_triton.low_products(x, lora_a, x_scale, dtype)


def _norm_fake(x: Tensor, _weight: Tensor, _eps: float, lora_a: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=OPERAND), x.new_empty(x.shape[0], 0 if lora_a is None else lora_a.shape[0])


def _low_fake(x: Tensor, lora_a: Tensor, _x_scale: float, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], lora_a.shape[0], dtype=dtype)


torch.library.impl("fourfold::decode_norm", "default", decode_norm_reference)
torch.library.impl("fourfold::decode_norm", "cuda", _norm_cuda)
torch.library.register_fake("fourfold::decode_norm", _norm_fake)
torch.library.impl("fourfold::low_products", "default", low_products_reference)
torch.library.impl("fourfold::low_products", "cuda", _low_cuda)
torch.library.register_fake("fourfold::low_products", _low_fake)
