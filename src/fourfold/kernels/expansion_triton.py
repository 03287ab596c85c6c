"""Expansion in Triton: one launch writes a linear's weight, its adapter and the zeros around it.

The first programs decode the weight as `blockwise_triton` does, the next write the columns beyond W (B and zeros), the
last write the rows below W (A and zeros).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.blockwise_triton import WORDS, NestedParts, geometry, product_tile
from fourfold.kernels.launching import on_device

__all__ = ["expand_"]

ADAPTER_TILE = 2048


@triton.jit(
    do_not_specialize=[
        *("num_rows", "row", "total_rows", "used_ranks", "rank_row", "rank", "num_zero_rows"),
        *("num_weight_programs", "num_b_programs"),
    ]
)
def expand_kernel(
    out_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    lora_a_ptr: tl.tensor,
    lora_b_ptr: tl.tensor,
    scaling: tl.tensor,
    num_columns: tl.tensor,
    padded_ranks: tl.tensor,
    stride: tl.tensor,
    num_rows: tl.tensor,
    row: tl.tensor,
    total_rows: tl.tensor,
    used_ranks: tl.tensor,
    rank_row: tl.tensor,
    rank: tl.tensor,
    num_zero_rows: tl.tensor,
    num_weight_programs: tl.tensor,
    num_b_programs: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    LOOKUP: tl.constexpr,
    WORDS: tl.constexpr,
    IS_WIDE: tl.constexpr,
    ADAPTER_TILE: tl.constexpr,
) -> None:
    """IS_WHOLE: rows of `out` and of W are whole words too. IS_WIDE: a row of W has at least a tile's elements."""
    PER_WORD: tl.constexpr = 32 // BITS
    TILE: tl.constexpr = WORDS * PER_WORD
    program = tl.program_id(0)
    dtype = out_ptr.dtype.element_ty
    if program < num_weight_programs:
        product, mask = product_tile(
            *(program, num_rows * num_columns),
            *(codes_ptr, codebook_ptr, scales_ptr, code_map_ptr, nested_absmax_ptr, offset_ptr),
            *(BITS, BLOCK_SHIFT, NESTED_SHIFT, IS_WHOLE, LOOKUP, WORDS),
        )
        first_row = program * TILE // num_columns
        column = program * TILE - first_row * num_columns + tl.arange(0, WORDS) * PER_WORD
        within = tl.arange(0, PER_WORD)[None, :]
        if IS_WHOLE:
            # A division a word, or none: a tile that is no longer than a row meets at most one row's end.
            further = (column >= num_columns).to(tl.int32) if IS_WIDE else column // num_columns
            place = (row + first_row + further).to(tl.int64) * stride + (column - further * num_columns)
            place = tl.multiple_of(place, PER_WORD)[:, None] + within
        else:
            columns = column[:, None] + within
            further = columns // num_columns
            place = (row + first_row + further).to(tl.int64) * stride + (columns - further * num_columns)
        tl.store(out_ptr + place, product.to(dtype), mask=mask)
    elif program < num_weight_programs + num_b_programs:
        b_index = (program - num_weight_programs) * ADAPTER_TILE + tl.arange(0, ADAPTER_TILE)
        b_mask = b_index < num_rows * padded_ranks
        b_row = b_index // padded_ranks
        rank_column = b_index - b_row * padded_ranks
        b_value = tl.full([ADAPTER_TILE], 0.0, tl.float32)
        if lora_b_ptr is not None:
            own = rank_column - rank_row
            b_value = tl.load(lora_b_ptr + b_row * rank + own, mask=b_mask & (own >= 0) & (own < rank), other=0.0)
            b_value = b_value.to(tl.float32) * scaling
        tl.store(
            out_ptr + (row + b_row).to(tl.int64) * stride + num_columns + rank_column, b_value.to(dtype), mask=b_mask
        )
    else:
        a_index = (program - num_weight_programs - num_b_programs) * ADAPTER_TILE + tl.arange(0, ADAPTER_TILE)
        a_mask = a_index < (rank + num_zero_rows) * num_columns
        a_row = a_index // num_columns
        a_column = a_index - a_row * num_columns
        a_value = tl.full([ADAPTER_TILE], 0.0, tl.float32)
        if lora_a_ptr is not None:
            a_value = tl.load(lora_a_ptr + a_index, mask=a_mask & (a_row < rank), other=0.0).to(tl.float32)
        to_row = total_rows + tl.where(a_row < rank, rank_row + a_row, used_ranks + a_row - rank)
        tl.store(out_ptr + to_row.to(tl.int64) * stride + a_column, a_value.to(dtype), mask=a_mask)


def expand_(
    out: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor,
    block_size: int,
    nested: NestedParts | None,
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
    """`fourfold.kernels.expansion.expand_blockwise_`, and `expand_nested_` where `nested` is given."""
    num_elements = num_rows * num_columns
    padded_ranks, stride = out.shape[1] - num_columns, out.stride(0)
    constants = geometry(codes, codebook, num_elements, block_size, nested)
    per_word = 32 // int(constants["BITS"])
    constants["IS_WHOLE"] = bool(constants["IS_WHOLE"]) and num_columns % per_word == 0 == stride % per_word
    rank = 0 if lora_a is None else lora_a.shape[0]
    num_zero_rows = padded_ranks - used_ranks if row == 0 else 0
    weight_programs = triton.cdiv(num_elements, WORDS * per_word)
    b_programs = triton.cdiv(num_rows * padded_ranks, ADAPTER_TILE)
    a_programs = triton.cdiv((rank + num_zero_rows) * num_columns, ADAPTER_TILE)
    code_map, nested_absmax, offset, _ = nested or (None, None, None, None)
    # A rank of 0 has no bytes to point at.
    a = lora_a.contiguous() if lora_a is not None and rank else None
    b = lora_b.contiguous() if lora_b is not None and rank else None
    with on_device(out):
        expand_kernel[(weight_programs + b_programs + a_programs,)](
            *(out, codes, codebook, scales, code_map, nested_absmax, offset, a, b, float(scaling)),
            *(num_columns, padded_ranks, stride, num_rows, row, total_rows, used_ranks, rank_row, rank),
            *(num_zero_rows, weight_programs, b_programs),
            **constants,
            IS_WIDE=num_columns >= WORDS * per_word,
            ADAPTER_TILE=ADAPTER_TILE,
            num_warps=4,
            enable_fp_fusion=False,
        )
