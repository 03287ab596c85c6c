"""y = x W^T + b for few rows of x and a W of 4 bits, without writing the dense W anywhere.

With up to 64 rows a product is bound by reading W, so reading a quarter of its bytes is what can be gained. The weights
that are multiplied are exactly those of `dequantize_blockwise` in the dtype of x; sums are in fp32.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import triton_refuses
from fourfold.kernels.blockwise import dequantize_blockwise, dequantize_nested

__all__ = ["MAX_ROWS", "matmul_4bit", "matmul_4bit_reference", "serves"]

MAX_ROWS = 64

torch.library.define(
    "fourfold::matmul_4bit",
    "(Tensor x, Tensor codes, Tensor codebook, Tensor scales, Tensor? code_map, Tensor? nested_absmax, "
    "Tensor? offset, SymInt block_size, SymInt nested_block_size, SymInt num_rows, Tensor? bias) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.matmul_4bit.default


def serves(x: Tensor, codebook: Tensor, block_size: int, nested_block_size: int, num_rows: int) -> bool:
    """Whether a kernel takes this product; if not, dequantize and multiply, which is what the operator does then.

    Args:
        x: [..., K].
        codebook, block_size, nested_block_size: As `matmul_4bit` takes them.
        num_rows: Rows of W.
    """
    columns = x.shape[-1]
    return (
        x.is_cuda
        and 0 < x.numel() <= MAX_ROWS * columns
        and x.dtype in (torch.bfloat16, torch.float16)
        and codebook.numel() == 16
        and columns % 64 == 0
        and block_size >= 64
        and block_size & (block_size - 1) == 0
        and nested_block_size & (nested_block_size - 1) == 0
        # The kernels' offsets have 32 bits: those of W, and those of x with room for columns past the end.
        and max(num_rows, 2 * MAX_ROWS) * columns < 2**31
        and triton_refuses(x) is None
    )


def matmul_4bit(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor,
    code_map: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    nested_block_size: int,
    num_rows: int,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + b.

    Args:
        x: fp32, fp16 or bf16 [..., K].
        codes, codebook, block_size: W [num_rows, K], as `dequantize_blockwise` takes it.
        scales: fp32 [num_blocks]; or uint8 [num_blocks], with the four that `dequantize_scales` takes.
        code_map, nested_absmax, offset, nested_block_size: See there; None and 1 for fp32 scales.
        num_rows: Rows of W.
        bias: [num_rows] in the dtype of `x`, or None.

    Returns:
        [..., num_rows] in the dtype of `x`.
    """
    return cast(
        Tensor,
        _op(
            *(x, codes, codebook, scales, code_map, nested_absmax, offset),
            *(block_size, nested_block_size, num_rows, bias),
        ),
    )


def matmul_4bit_reference(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor,
    code_map: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    nested_block_size: int,
    num_rows: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`matmul_4bit` by dequantizing W."""
    shape = [num_rows, x.shape[-1]]
    if code_map is None or nested_absmax is None or offset is None:
        weight = dequantize_blockwise(codes, codebook, scales, block_size, shape, x.dtype)
    else:
        parts = (scales, code_map, nested_absmax, offset)
        weight = dequantize_nested(codes, codebook, *parts, block_size, nested_block_size, shape, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def _on_gpu(
    x: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor,
    code_map: Tensor | None,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    block_size: int,
    nested_block_size: int,
    num_rows: int,
    bias: Tensor | None = None,
) -> Tensor:
    arguments = (x, codes, codebook, scales, code_map, nested_absmax, offset, block_size, nested_block_size, num_rows)
    if not serves(x, codebook, block_size, nested_block_size, num_rows):
        return matmul_4bit_reference(*arguments, bias)
    from fourfold.kernels import small_batch_hopper_triton, small_batch_triton

    if bias is not None:
        bias = bias.contiguous()
    if small_batch_hopper_triton.takes(x, codes, block_size, num_rows):
        return small_batch_hopper_triton.matmul(*arguments, bias)
    return small_batch_triton.matmul(*arguments, bias)


def _fake(x: Tensor, *others: object) -> Tensor:
    num_rows = cast(int, others[8])
    return x.new_empty([*x.shape[:-1], num_rows])


torch.library.impl("fourfold::matmul_4bit", "default", matmul_4bit_reference)
torch.library.impl("fourfold::matmul_4bit", "cuda", _on_gpu)
torch.library.register_fake("fourfold::matmul_4bit", _fake)
