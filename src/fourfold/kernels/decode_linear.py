"""Linear layers of a decode step: up to three that share an input, with adapters and what follows, in one launch.

    y = x W^T + low (sB)^T + bias;  then y, y + residual, or silu(gate) * up of the two halves of y

W of 4 bits in blocks of 64 is never written anywhere. Its code points are multiplied as fp16 (within 2^-12 of
themselves, an eighth of what rounding W to bf16 costs), a block's sum with its scale in fp32. Sums are in fp32 and
rounded once to what the model computes in, before the residual or the activation, as Transformers has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import triton_refuses
from fourfold.kernels.blockwise import dequantize_blockwise, dequantize_nested
from fourfold.kernels.decode_norm import OPERAND, to_operand
from fourfold.kernels.low_rank import working_dtype
from fourfold.kernels.swiglu import swiglu_reference

__all__ = ["MAX_ROWS", "decode_linear", "decode_linear_reference", "serves"]

# Of x. From 33 on, W is decoded once for every 32 of them.
MAX_ROWS = 64

torch.library.define(
    "fourfold::decode_linear",
    "(Tensor x, Tensor[] codes, Tensor codebook, Tensor[] scales, Tensor? code_map, Tensor[] nested_absmax, "
    "Tensor[] offsets, int nested_block_size, int[] num_rows, Tensor? bias, Tensor? residual, Tensor? low, "
    "Tensor? up, str activation, float x_scale, float out_scale, ScalarType dtype) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.decode_linear.default


def serves(device: torch.device, codebook: Tensor, block_size: int, num_rows: Sequence[int], num_columns: int) -> bool:
    """Whether the kernel takes such layers, for up to MAX_ROWS rows of x.

    Args:
        codebook, block_size: Of W.
        num_rows, num_columns: Of each layer's W.
    """
    return (
        device.type == "cuda"
        and codebook.numel() == 16
        and block_size == 64
        and num_columns % 64 == 0
        and len(num_rows) <= 3
        and all(rows * num_columns < 2**31 for rows in num_rows)
        and triton_refuses(codebook) is None
    )


def decode_linear(
    x: Tensor,
    codes: Sequence[Tensor],
    codebook: Tensor,
    scales: Sequence[Tensor],
    code_map: Tensor | None,
    nested_absmax: Sequence[Tensor],
    offsets: Sequence[Tensor],
    nested_block_size: int,
    num_rows: Sequence[int],
    *,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "",
    x_scale: float = 1.0,
    out_scale: float = 1.0,
) -> Tensor:
    """The layers' outputs beside each other, with the residual added, or gated.

    Args:
        x: fp16 [M, K], contiguous, M up to MAX_ROWS.
        codes, codebook: Of each layer, W [num_rows[i], K] in blocks of 64 as `dequantize_blockwise` takes it, whose
            memory begins at a multiple of 16 bytes.
        scales: Of each layer fp32 [num_blocks]; or uint8, with the four that follow, as `dequantize_nested` takes them.
        dtype: What the model computes in: bf16 or fp16, that of all of the following.
        bias: [N], N the sum of num_rows, or None.
        residual: [M, N], contiguous, added to the rounded y, or None.
        low: [M, members * R], contiguous: x A^T of each layer's adapter beside each other, or None.
        up: [N, R], contiguous: each layer's scaling * B over each other, R a power of two from 16 on; None without low.
        activation: "", or "silu" for a gate and an up of as many rows: silu(gate) rounded, times up.
        x_scale: What x is multiplied by.
        out_scale: What the gated result is multiplied by.

    Returns:
        [M, N] of `dtype`; with an activation fp16 [M, N / 2], as x is.
    """
    return cast(
        Tensor,
        _op(
            *(x, codes, codebook, scales, code_map, nested_absmax, offsets, nested_block_size, num_rows),
            *(bias, residual, low, up, activation, x_scale, out_scale, dtype),
        ),
    )


def decode_linear_reference(
    x: Tensor,
    codes: Sequence[Tensor],
    codebook: Tensor,
    scales: Sequence[Tensor],
    code_map: Tensor | None,
    nested_absmax: Sequence[Tensor],
    offsets: Sequence[Tensor],
    nested_block_size: int,
    num_rows: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    activation: str,
    x_scale: float,
    out_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """`decode_linear` in PyTorch, by dequantizing each W to fp32."""
    wide = working_dtype(x.dtype)
    x = x.to(wide) * x_scale
    outputs, row = [], 0
    for index, rows in enumerate(num_rows):
        shape = [rows, x.shape[1]]
        if code_map is None:
            weight = dequantize_blockwise(codes[index], codebook, scales[index], 64, shape, torch.float32)
        else:
            parts = (scales[index], code_map, nested_absmax[index], offsets[index])
            weight = dequantize_nested(codes[index], codebook, *parts, 64, nested_block_size, shape, torch.float32)
        y = x @ weight.to(wide).T
        if low is not None and up is not None:
            rank = up.shape[1]
            own = low[:, index * rank : (index + 1) * rank]
            y += own.to(wide) @ up[row : row + rows].to(wide).T
        outputs.append(y)
        row += rows
    y = torch.cat(outputs, dim=1)
    if bias is not None:
        y += bias
    y = y.to(dtype)
    if activation:
        return to_operand(swiglu_reference(y, None, activation).to(wide) * out_scale)
    return y if residual is None else residual + y


def _cuda(x: Tensor, codes: Sequence[Tensor], *others: object) -> Tensor:
    if triton_refuses(x) is not None or x.shape[0] > MAX_ROWS or x.dtype != OPERAND or x.shape[1] % 64:
        return decode_linear_reference(x, codes, *others)  # type: ignore[arg-type]
    from fourfold.kernels import decode_linear_triton

    return decode_linear_triton.decode_linear(x, codes, *others)  # type: ignore[arg-type]


def _fake(x: Tensor, codes: Sequence[Tensor], *others: object) -> Tensor:
    num_rows, activation = cast("list[int]", others[6]), others[11]
    if activation:
        return x.new_empty(x.shape[0], num_rows[0])
    return x.new_empty(x.shape[0], sum(num_rows), dtype=cast(torch.dtype, others[14]))


torch.library.impl("fourfold::decode_linear", "default", decode_linear_reference)
torch.library.impl("fourfold::decode_linear", "cuda", _cuda)
torch.library.register_fake("fourfold::decode_linear", _fake)
