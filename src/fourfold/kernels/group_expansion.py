"""Expansion of linears that share a format: what a call of `expansion` writes for one, written for all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.expansion import (
    check_place,
    expand_blockwise_reference,
    expand_nested_reference,
    says_no_kernel_expands,
)

__all__ = ["expand_group_", "expand_group_reference"]

torch.library.define(
    "fourfold::expand_group_",
    "(Tensor(a!) out, Tensor[] codes, Tensor codebook, Tensor[] scales, Tensor? code_map, Tensor[] nested_absmax, "
    "Tensor[] offsets, SymInt block_size, SymInt nested_block_size, SymInt[] num_rows, SymInt num_columns, "
    "Tensor?[] lora_a, Tensor?[] lora_b, float[] scalings) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.expand_group_.default


def expand_group_(
    out: Tensor,
    codes: Sequence[Tensor],
    codebook: Tensor,
    scales: Sequence[Tensor],
    code_map: Tensor | None,
    nested_absmax: Sequence[Tensor],
    offsets: Sequence[Tensor],
    block_size: int,
    nested_block_size: int,
    num_rows: Sequence[int],
    num_columns: int,
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scalings: Sequence[float],
) -> None:
    """Write all linears of the matrix `out`, which `fourfold.kernels.expansion` describes.

    On a GPU it is one launch for up to three linears whose weights are nested or not, of 4 bits and whole tiles, and
    one launch a linear otherwise. Each list has one entry for each linear, in the order of their rows.

    Args:
        out: fp32, fp16 or bf16 [N + R, num_columns + R], N the sum of `num_rows`; last stride 1.
        codes, codebook, block_size: As `dequantize_blockwise` takes them; the codebook is all linears'.
        scales: Codes of the scales, with `code_map`, `nested_absmax`, `offsets` and `nested_block_size` as
            `dequantize_scales` takes them; or fp32 scales, with None, two empty lists and 1.
        num_rows, num_columns: Output features of each linear, and the input features of all.
        lora_a: Any floating dtype [rank, num_columns] each, or None.
        lora_b: Any floating dtype [num_rows, rank] each, or None.
        scalings: Factors of B; their product is formed in fp32 and rounded once.

    Raises:
        QuantizationError: The linears or their adapters do not fit their places.
    """
    for place in _places(num_rows, num_columns, lora_a, lora_b, scalings):
        check_place(out, *place[:-1])
    _op(
        *(out, codes, codebook, scales, code_map, nested_absmax, offsets, block_size, nested_block_size),
        *(num_rows, num_columns, lora_a, lora_b, scalings),
    )


def _places(
    num_rows: Sequence[int],
    num_columns: int,
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scalings: Sequence[float],
) -> Iterator[tuple[Any, ...]]:
    """For each linear, the arguments of `expand_blockwise_` from `num_rows` on."""
    total_rows = sum(num_rows)
    ranks = [0 if lora is None else lora.shape[0] for lora in lora_a]
    used_ranks = sum(ranks)
    row = rank_row = 0
    for rows, rank, a, b, scaling in zip(num_rows, ranks, lora_a, lora_b, scalings, strict=True):
        yield rows, num_columns, row, total_rows, used_ranks, rank_row, a, b, scaling
        row, rank_row = row + rows, rank_row + rank


def expand_group_reference(
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
    """`expand_group_` in PyTorch, one linear after the other."""
    for index, place in enumerate(_places(num_rows, num_columns, lora_a, lora_b, scalings)):
        if code_map is None:
            expand_blockwise_reference(out, codes[index], codebook, scales[index], block_size, *place)
        else:
            parts = (scales[index], code_map, nested_absmax[index], offsets[index], block_size, nested_block_size)
            expand_nested_reference(out, codes[index], codebook, *parts, *place)


def _on_gpu(
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
    parts = (codes, codebook, scales, code_map, nested_absmax, offsets, block_size, nested_block_size)
    linears = (num_rows, num_columns, lora_a, lora_b, scalings)
    if says_no_kernel_expands(out, codes[0], codebook, block_size, nested_block_size):
        expand_group_reference(out, *parts, *linears)
        return
    from fourfold.kernels import blockwise_triton, expansion_triton, group_expansion_triton

    nested_size = None if code_map is None else nested_block_size
    if group_expansion_triton.takes(out, codes, codebook, block_size, nested_size, num_rows, num_columns):
        group_expansion_triton.expand_group_(out, *parts, *linears)
        return
    for index, place in enumerate(_places(*linears)):
        nested = None
        if code_map is not None:
            nested = blockwise_triton.NestedParts(code_map, nested_absmax[index], offsets[index], nested_block_size)
        expansion_triton.expand_(out, codes[index], codebook, scales[index], block_size, nested, *place)


def _fake(*_: object) -> None:
    return None


torch.library.impl("fourfold::expand_group_", "default", expand_group_reference)
torch.library.impl("fourfold::expand_group_", "cuda", _on_gpu)
torch.library.register_fake("fourfold::expand_group_", _fake)
