"""Expansion: a quantized weight and its adapter written into one dense matrix, so that one product serves both.

For linears that share an input of K features, with N1, N2, ... output features (N together) and adapters of ranks r1,
r2, ... (R together, padded), the matrix `out` is [N + R, K + R]:

    out = [ W          scaling * B ]     W: the dequantized weights, one below the other
          [ A          (never touched) ] A: the adapters' lora_A, one below the other; padding is zero

B is block diagonal: the columns of a linear's rows that belong to other linears' ranks are zero. With XA = X A^T,

    [X, XA] [W, scaling * B]^T = X W^T + scaling * XA B^T        (the forward product of all linears)
    dY [W, scaling * B]        = [dY W, scaling * dY B]          (the gradients of X, but for A's part, and of XA)

A call writes one linear, or all that share a format (`group_expansion`). The one whose `row` is 0 also writes the zeros
below the last adapter. Rows of `out` may be followed by elements that belong to none: they are never touched.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.kernels.availability import say_once
from fourfold.kernels.blockwise import dequantize_blockwise, dequantize_scales, says_no_kernel

__all__ = [
    "check_place",
    "expand_blockwise_",
    "expand_blockwise_reference",
    "expand_nested_",
    "expand_nested_reference",
    "says_no_kernel_expands",
]

logger = logging.getLogger(__name__)

_PLACE = (
    "SymInt block_size, {nested}SymInt num_rows, SymInt num_columns, SymInt row, SymInt total_rows, "
    "SymInt used_ranks, SymInt rank_row, Tensor? lora_a, Tensor? lora_b, float scaling) -> ()"
)
torch.library.define(
    "fourfold::expand_blockwise_",
    "(Tensor(a!) out, Tensor codes, Tensor codebook, Tensor absmax, " + _PLACE.format(nested=""),
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::expand_nested_",
    "(Tensor(a!) out, Tensor codes, Tensor codebook, Tensor scale_codes, Tensor code_map, Tensor nested_absmax, "
    "Tensor offset, " + _PLACE.format(nested="SymInt nested_block_size, "),
    tags=torch.Tag.pt2_compliant_tag,
)
_blockwise_op = torch.ops.fourfold.expand_blockwise_.default
_nested_op = torch.ops.fourfold.expand_nested_.default


def expand_blockwise_(
    out: Tensor,
    codes: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    num_rows: int,
    num_columns: int,
    row: int,
    total_rows: int,
    used_ranks: int,
    rank_row: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> None:
    """Write one linear, whose scales are in fp32, into its place in `out`.

    Args:
        out: fp32, fp16 or bf16 [total_rows + R, num_columns + R], last stride 1; with R = 0 the weights alone.
        codes, codebook, absmax, block_size: As `dequantize_blockwise` takes them.
        num_rows, num_columns: Output and input features of this linear.
        row: Its first row of `out`.
        total_rows: Output features of all linears.
        used_ranks: Ranks of all adapters together, at most R.
        rank_row: The ranks of the adapters before this one: its place among the columns and rows beyond W.
        lora_a: Any floating dtype [rank, num_columns], or None.
        lora_b: Any floating dtype [num_rows, rank], or None.
        scaling: Factor of B; their product is formed in fp32 and rounded once.

    Raises:
        QuantizationError: The linear or its adapter does not fit its place.
    """
    check_place(out, num_rows, num_columns, row, total_rows, used_ranks, rank_row, lora_a, lora_b)
    _blockwise_op(
        *(out, codes, codebook, absmax, block_size, num_rows, num_columns),
        *(row, total_rows, used_ranks, rank_row, lora_a, lora_b, scaling),
    )


def expand_nested_(
    out: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale_codes: Tensor,
    code_map: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    nested_block_size: int,
    num_rows: int,
    num_columns: int,
    row: int,
    total_rows: int,
    used_ranks: int,
    rank_row: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> None:
    """`expand_blockwise_` for scales that are quantized themselves, given as `dequantize_scales` takes them."""
    check_place(out, num_rows, num_columns, row, total_rows, used_ranks, rank_row, lora_a, lora_b)
    _nested_op(
        *(out, codes, codebook, scale_codes, code_map, nested_absmax, offset, block_size, nested_block_size),
        *(num_rows, num_columns, row, total_rows, used_ranks, rank_row, lora_a, lora_b, scaling),
    )


def check_place(
    out: Tensor,
    num_rows: int,
    num_columns: int,
    row: int,
    total_rows: int,
    used_ranks: int,
    rank_row: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
) -> None:
    """Raise QuantizationError unless the linear and its adapter fit their place: kernels follow bare pointers."""
    rank = 0 if lora_a is None else lora_a.shape[0]
    padded_ranks = out.shape[1] - num_columns
    fits = (
        out.stride(1) == 1
        and out.stride(0) >= out.shape[1]
        and out.shape[0] == total_rows + padded_ranks
        and row >= 0
        and row + num_rows <= total_rows
        and rank_row + rank <= used_ranks <= padded_ranks
        and (lora_a is None) == (lora_b is None)
        and (lora_a is None or lora_a.shape[1] == num_columns)
        and (lora_b is None or tuple(lora_b.shape) == (num_rows, rank))
    )
    if not fits:
        a, b = (None if lora is None else tuple(lora.shape) for lora in (lora_a, lora_b))
        raise QuantizationError(
            "a linear and its adapter do not fit their place in the expanded matrix",
            found=f"out {tuple(out.shape)}, weight {(num_rows, num_columns)} at row {row} of {total_rows}, "
            f"lora_A {a} and lora_B {b} at rank {rank_row} of {used_ranks}",
            allowed="out [total_rows + R, columns + R] of last stride 1, lora_A [rank, columns], lora_B [rows, rank]",
        )


def expand_blockwise_reference(
    out: Tensor,
    codes: Tensor,
    codebook: Tensor,
    absmax: Tensor,
    block_size: int,
    num_rows: int,
    num_columns: int,
    row: int,
    total_rows: int,
    used_ranks: int,
    rank_row: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> None:
    """`expand_blockwise_` in PyTorch: what a kernel must equal bit for bit, or else what runs."""
    rows = out[row : row + num_rows]
    rows[:, :num_columns] = dequantize_blockwise(
        codes, codebook, absmax, block_size, [num_rows, num_columns], out.dtype
    )
    rows[:, num_columns:] = 0
    if row == 0:
        out[total_rows + used_ranks :, :num_columns] = 0
    if lora_a is not None and lora_b is not None:
        rank = lora_a.shape[0]
        rows[:, num_columns + rank_row : num_columns + rank_row + rank] = lora_b.float() * scaling
        out[total_rows + rank_row : total_rows + rank_row + rank, :num_columns] = lora_a


def expand_nested_reference(
    out: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale_codes: Tensor,
    code_map: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    nested_block_size: int,
    num_rows: int,
    num_columns: int,
    row: int,
    total_rows: int,
    used_ranks: int,
    rank_row: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> None:
    """`expand_nested_` in PyTorch."""
    absmax = dequantize_scales(scale_codes, code_map, nested_absmax, offset, nested_block_size)
    expand_blockwise_reference(
        *(out, codes, codebook, absmax, block_size, num_rows, num_columns),
        *(row, total_rows, used_ranks, rank_row, lora_a, lora_b, scaling),
    )


def _fake(*_: object) -> None:
    return None


def says_no_kernel_expands(
    out: Tensor, codes: Tensor, codebook: Tensor, block_size: int, nested_block_size: int = 1
) -> bool:
    """Whether no Triton kernel writes such a weight into `out`; logs, once, why."""
    if out.shape[0] * out.stride(0) >= 2**31:
        say_once(logger, "weights of 2**31 elements or more are dequantized by PyTorch, slower than by a kernel")
        return True
    return says_no_kernel(codes, codebook, block_size, nested_block_size)


def _blockwise_on_gpu(
    out: Tensor, codes: Tensor, codebook: Tensor, absmax: Tensor, block_size: int, *place: Any
) -> None:
    if says_no_kernel_expands(out, codes, codebook, block_size):
        expand_blockwise_reference(out, codes, codebook, absmax, block_size, *place)
        return
    from fourfold.kernels import expansion_triton

    expansion_triton.expand_(out, codes, codebook, absmax, block_size, None, *place)


def _nested_on_gpu(
    out: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale_codes: Tensor,
    code_map: Tensor,
    nested_absmax: Tensor,
    offset: Tensor,
    block_size: int,
    nested_block_size: int,
    *place: Any,
) -> None:
    if says_no_kernel_expands(out, codes, codebook, block_size, nested_block_size):
        parts = (scale_codes, code_map, nested_absmax, offset, block_size, nested_block_size)
        expand_nested_reference(out, codes, codebook, *parts, *place)
        return
    from fourfold.kernels import blockwise_triton, expansion_triton

    nested = blockwise_triton.NestedParts(code_map, nested_absmax, offset, nested_block_size)
    expansion_triton.expand_(out, codes, codebook, scale_codes, block_size, nested, *place)


torch.library.impl("fourfold::expand_blockwise_", "default", expand_blockwise_reference)
torch.library.impl("fourfold::expand_nested_", "default", expand_nested_reference)
torch.library.register_fake("fourfold::expand_blockwise_", _fake)
torch.library.register_fake("fourfold::expand_nested_", _fake)
torch.library.impl("fourfold::expand_blockwise_", "cuda", _blockwise_on_gpu)
torch.library.impl("fourfold::expand_nested_", "cuda", _nested_on_gpu)
