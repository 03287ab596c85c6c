"""Expansion in Triton: one launch writes the weights of up to three linears, their adapters and the zeros around them.

The first programs write the columns beyond W (B and zeros), the next the rows below W (A and zeros), both small, the
others decode the weights as `blockwise_triton` does those of whole tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.blockwise_triton import EVEN, even_tile_size, is_even, write_even_tile
from fourfold.kernels.launching import cdiv, on_device

__all__ = ["MAX_MEMBERS", "expand_group_", "takes"]

MAX_MEMBERS = 3
# With more, the adapters' programs would take registers from all the others.
ADAPTER_TILE = 512


@triton.jit
def of_member(
    index: tl.tensor,
    first_1: tl.tensor,
    first_2: tl.tensor,
    of_0: tl.tensor,
    of_1: tl.tensor,
    of_2: tl.tensor,
) -> tl.tensor:
    """Of three pointers, that of the member to which `index` belongs: the second from `first_1` on, and so on."""
    chosen = of_0
    if of_1 is not None:
        chosen = tl.where(index >= first_1, of_1, chosen)
    if of_2 is not None:
        chosen = tl.where(index >= first_2, of_2, chosen)
    return chosen


@triton.jit
def with_b(
    value: tl.tensor,
    lora_b_ptr: tl.tensor,
    scaling: tl.tensor,
    row: tl.tensor,
    rank_column: tl.tensor,
    first_row: tl.tensor,
    last_row: tl.tensor,
    first_rank: tl.tensor,
    rank: tl.tensor,
) -> tl.tensor:
    """`value`, with a member's scaling * B where that member stands."""
    if lora_b_ptr is not None:
        own = rank_column - first_rank
        is_own = (row >= first_row) & (row < last_row) & (own >= 0) & (own < rank)
        loaded = tl.load(lora_b_ptr + (row - first_row) * rank + own, mask=is_own, other=0.0)
        value = tl.where(is_own, loaded.to(tl.float32) * scaling, value)
    return value


@triton.jit
def with_a(
    value: tl.tensor,
    lora_a_ptr: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    first_rank: tl.tensor,
    rank: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """`value`, with a member's A where that member stands."""
    if lora_a_ptr is not None:
        own = row - first_rank
        is_own = (own >= 0) & (own < rank)
        loaded = tl.load(lora_a_ptr + own * COLUMNS + column, mask=is_own, other=0.0)
        value = tl.where(is_own, loaded.to(tl.float32), value)
    return value


# Of what the members hold for themselves single bytes and words are read, so alignment is worth no kernel of its own.
_MEMBERS = [f"{name}_{i}" for name in ("codes", "scales", "nested", "offset") for i in range(MAX_MEMBERS)]
_COUNTS = ["row_1", "row_2", "total_rows", "rank_0", "rank_1", "rank_2", "tile_1", "tile_2"]


@triton.jit(
    do_not_specialize=[*_COUNTS, "num_b_programs", "num_adapter_programs"], do_not_specialize_on_alignment=_MEMBERS
)
def expand_group_kernel(
    out_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    codes_0: tl.tensor,
    codes_1: tl.tensor,
    codes_2: tl.tensor,
    scales_0: tl.tensor,
    scales_1: tl.tensor,
    scales_2: tl.tensor,
    nested_0: tl.tensor,
    nested_1: tl.tensor,
    nested_2: tl.tensor,
    offset_0: tl.tensor,
    offset_1: tl.tensor,
    offset_2: tl.tensor,
    lora_a_0: tl.tensor,
    lora_a_1: tl.tensor,
    lora_a_2: tl.tensor,
    lora_b_0: tl.tensor,
    lora_b_1: tl.tensor,
    lora_b_2: tl.tensor,
    scaling_0: tl.tensor,
    scaling_1: tl.tensor,
    scaling_2: tl.tensor,
    rank_0: tl.tensor,
    rank_1: tl.tensor,
    rank_2: tl.tensor,
    row_1: tl.tensor,
    row_2: tl.tensor,
    total_rows: tl.tensor,
    tile_1: tl.tensor,
    tile_2: tl.tensor,
    num_b_programs: tl.tensor,
    num_adapter_programs: tl.tensor,
    COLUMNS: tl.constexpr,
    RANKS: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    LOOKUP: tl.constexpr,
    ADAPTER_TILE: tl.constexpr,
    THREADS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """A member is a linear; its arguments are None, or anything, where there are fewer.

    COLUMNS: of W. RANKS: columns beyond W, and rows below. STRIDE: elements from a row of `out` to the next.
    """
    program = tl.program_id(0)
    dtype = out_ptr.dtype.element_ty
    if program >= num_adapter_programs:
        tile = program - num_adapter_programs
        codes_ptr = of_member(tile, tile_1, tile_2, codes_0, codes_1, codes_2)
        scales_ptr = of_member(tile, tile_1, tile_2, scales_0, scales_1, scales_2)
        # Without a map these two are not read; a None may be handed on only as it came.
        nested_ptr = scales_ptr
        offset_ptr = scales_ptr
        if code_map_ptr is not None:
            nested_ptr = of_member(tile, tile_1, tile_2, nested_0, nested_1, nested_2)
            offset_ptr = of_member(tile, tile_1, tile_2, offset_0, offset_1, offset_2)
        first_tile = tl.where(tile >= tile_2, tile_2, tl.where(tile >= tile_1, tile_1, 0))
        write_even_tile(
            *(out_ptr, tile, tile - first_tile),
            *(codes_ptr, codebook_ptr, scales_ptr, code_map_ptr, nested_ptr, offset_ptr),
            *(COLUMNS, STRIDE - COLUMNS, BLOCK_SHIFT, NESTED_SHIFT, LOOKUP, THREADS, CHUNKS),
        )
    # Without ranks no program comes here, and a division by them would not compile.
    elif RANKS > 0:
        if program < num_b_programs:
            b_index = program * ADAPTER_TILE + tl.arange(0, ADAPTER_TILE)
            b_row = b_index // RANKS
            rank_column = b_index % RANKS
            b = tl.full([ADAPTER_TILE], 0.0, tl.float32)
            b = with_b(b, lora_b_0, scaling_0, b_row, rank_column, 0, row_1, 0, rank_0)
            b = with_b(b, lora_b_1, scaling_1, b_row, rank_column, row_1, row_2, rank_0, rank_1)
            b = with_b(b, lora_b_2, scaling_2, b_row, rank_column, row_2, total_rows, rank_0 + rank_1, rank_2)
            b_place = b_row.to(tl.int64) * STRIDE + COLUMNS + rank_column
            tl.store(out_ptr + b_place, b.to(dtype), mask=b_row < total_rows)
        else:
            a_index = (program - num_b_programs) * ADAPTER_TILE + tl.arange(0, ADAPTER_TILE)
            a_row = a_index // COLUMNS
            a_column = a_index % COLUMNS
            a = tl.full([ADAPTER_TILE], 0.0, tl.float32)
            a = with_a(a, lora_a_0, a_row, a_column, 0, rank_0, COLUMNS)
            a = with_a(a, lora_a_1, a_row, a_column, rank_0, rank_1, COLUMNS)
            a = with_a(a, lora_a_2, a_row, a_column, rank_0 + rank_1, rank_2, COLUMNS)
            a_place = (total_rows + a_row).to(tl.int64) * STRIDE + a_column
            tl.store(out_ptr + a_place, a.to(dtype), mask=a_row < RANKS)


def takes(
    out: Tensor, codes: list[Tensor], codebook: Tensor, block_size: int, nested_block_size: int | None,
    num_rows: list[int], num_columns: int,
) -> bool:  # fmt: skip
    """Whether `expand_group_` serves such linears: few enough, each of whole tiles, and rows of whole words."""
    return (
        len(codes) <= MAX_MEMBERS
        and num_columns % 8 == 0 == out.stride(0) % 8
        and all(
            is_even(part, codebook, rows * num_columns, block_size, nested_block_size)
            for part, rows in zip(codes, num_rows, strict=True)
        )
    )


def expand_group_(
    out: Tensor,
    codes: list[Tensor],
    codebook: Tensor,
    scales: list[Tensor],
    code_map: Tensor | None,
    nested_absmax: list[Tensor],
    offsets: list[Tensor],
    block_size: int,
    nested_block_size: int,
    num_rows: list[int],
    num_columns: int,
    lora_a: list[Tensor | None],
    lora_b: list[Tensor | None],
    scalings: list[float],
) -> None:
    """`fourfold.kernels.group_expansion.expand_group_` of linears that this takes."""
    missing = MAX_MEMBERS - len(codes)
    none = [None] * missing
    nested, offset = ([None] * len(codes), [None] * len(codes)) if code_map is None else (nested_absmax, offsets)
    # A rank of 0 has no bytes to point at.
    a = [None if lora is None or not len(lora) else lora.contiguous() for lora in lora_a]
    b = [None if lora is None or not lora.shape[1] else lora.contiguous() for lora in lora_b]
    ranks = [0 if lora is None else len(lora) for lora in a]
    # Members that are missing begin where the last one ends.
    rows = [*num_rows, *[0] * missing]
    row_1, row_2, total_rows = rows[0], rows[0] + rows[1], sum(rows)
    padded_ranks = out.shape[1] - num_columns
    tile = even_tile_size()
    b_programs = cdiv(total_rows * padded_ranks, ADAPTER_TILE)
    adapter_programs = b_programs + cdiv(padded_ranks * num_columns, ADAPTER_TILE)
    with on_device(out):
        expand_group_kernel[(adapter_programs + total_rows * num_columns // tile,)](
            *(out, codebook, code_map, *codes, *none, *scales, *none, *nested, *none, *offset, *none),
            *(*a, *none, *b, *none, *scalings, *[0.0] * missing, *ranks, *[0] * missing),
            *(row_1, row_2, total_rows, row_1 * num_columns // tile, row_2 * num_columns // tile),
            *(b_programs, adapter_programs),
            COLUMNS=num_columns,
            RANKS=padded_ranks,
            STRIDE=out.stride(0),
            BLOCK_SHIFT=block_size.bit_length() - 1,
            NESTED_SHIFT=nested_block_size.bit_length() - 1,
            LOOKUP="shuffle" if out.is_cuda else "gather",
            ADAPTER_TILE=ADAPTER_TILE,
            **EVEN,
            num_warps=EVEN["THREADS"] // 32,
            enable_fp_fusion=False,
        )
