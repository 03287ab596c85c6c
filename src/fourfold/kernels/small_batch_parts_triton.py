"""What the kernels of `small_batch` share: which lane holds what of W, and the sums of programs that share columns.

Decoding takes the time, so a weight is decoded in the very register in which the tensor cores want it: nothing of W
passes through shared memory. In a product of the tensor cores, out^T += W x^T over 16 columns, lane 4 r + q of a warp
holds of rows r and r + 8 of W the columns 2 q, 2 q + 1, 2 q + 8 and 2 q + 9. The order of the columns in a sum is free,
so the lane reads whole words of codes, eight columns each that are neighbours in memory, and x is brought into the
order of the columns that this makes.

Tiles have one dimension for [rows / 8, WARPS, 8 (r), 4 (q)] and further ones for what a lane loads at once: Triton
deals the elements of a dimension to the lanes, then to the warps, so that what is loaded is the operand already, and no
layout is converted. In which order it deals several dimensions depends on its version. Shapes are changed by `reshape`
and not by `[..., None]` because only that lets Triton carry a load's layout on.

The four lanes that share a row of W, a quad, go through a span of four blocks together: each decodes the scale of one
block, and hands it to the others when its turn comes.

Where the rows of W give too few programs to fill the GPU, programs share the columns too, and another launch adds their
fp32 sums, always in the same order. From compute capability 9.0 on, a launch begins while the one before is ending, and
waits only before it reads its results (programmatic dependent launch). That goes for what follows a launch of ours
alone: what came before that one has ended by then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import cdiv

__all__ = ["from_quad", "new_partial", "places", "store_sums", "sum_kernel", "sum_splits"]


@triton.jit
def places(ROWS: tl.constexpr, WARPS: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """q, r, the warp and the block of 8 rows of all [ROWS / 8, WARPS, 8 (r), 4 (q)], each in one dimension."""
    place = tl.arange(0, 4 * ROWS * WARPS)
    return place % 4, place // 4 % 8, place // 32 % WARPS, place // (32 * WARPS)


@triton.jit
def from_quad(value: tl.tensor, holder: tl.tensor, PLACES: tl.constexpr) -> tl.tensor:
    """For all [PLACES], the value that lane `holder` of the same quad has."""
    lanes = holder.reshape(PLACES // 4, 4)
    return tl.gather(value.reshape(PLACES // 4, 4), lanes, 1).reshape(PLACES)


@triton.jit
def store_sums(
    out_ptr: tl.tensor,
    sums: tl.tensor,
    bias_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_rows: tl.tensor,
    IS_SPLIT: tl.constexpr,
) -> None:
    """fp32 [rows of W of this program, BLOCK_M], with the bias, as part of the result [num_inputs, num_rows].

    IS_SPLIT: As it is, as part of [splits, num_rows, BLOCK_M].
    """
    ROWS: tl.constexpr = sums.shape[0]
    BLOCK_M: tl.constexpr = sums.shape[1]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.arange(0, BLOCK_M)
    has_row = (row < num_rows)[:, None]
    if IS_SPLIT:
        place = (tl.program_id(1) * num_rows + row)[:, None] * BLOCK_M + m[None, :]
        tl.store(out_ptr + place, sums, mask=has_row)
    else:
        if bias_ptr is not None:
            sums += tl.load(bias_ptr + row, mask=row < num_rows, other=0.0).to(tl.float32)[:, None]
        place = m[None, :] * num_rows + row[:, None]
        tl.store(out_ptr + place, sums.to(out_ptr.dtype.element_ty), mask=has_row & (m < num_inputs)[None, :])


@triton.jit(do_not_specialize=["num_inputs"])
def sum_kernel(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_inputs: tl.tensor,
    num_rows: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:
    """The sum over the first axis of fp32 [SPLITS, num_rows, BLOCK_M], with the bias, as [num_inputs, num_rows]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    mask = (row < num_rows)[:, None] & (m[None, :] < num_inputs)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    total = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for split in tl.static_range(SPLITS):
        place = (split * num_rows + row)[:, None] * BLOCK_M + m[None, :]
        total += tl.load(partial_ptr + place, mask=mask, other=0.0)
    store_sums(out_ptr, total, bias_ptr, num_inputs, num_rows, False)


def new_partial(out: Tensor, splits: int, block_m: int) -> Tensor:
    """Where the programs leave their sums: `out` [..., num_rows] itself, or what `sum_splits` takes."""
    if splits == 1:
        return out
    return torch.empty([splits, out.shape[-1], block_m], dtype=torch.float32, device=out.device)


def sum_splits(out: Tensor, partial: Tensor, bias: Tensor | None, num_inputs: int, early: bool) -> None:
    """Writes the sum of what programs made that share the columns.

    Args:
        out: [num_inputs, num_rows].
        partial: fp32 [splits, num_rows, block_m].
        bias: [num_rows] or None.
        num_inputs: Rows of `out`, at most block_m.
        early: Launch it before the launch before it has ended, which must let it.
    """
    splits, num_rows, block_m = partial.shape
    # Fewer rows a program where there are few, so that the programs fill the GPU.
    block_n = 8 if num_rows <= 4096 else 32
    sum_kernel[(cdiv(num_rows, block_n),)](
        *(out, partial, bias, num_inputs, num_rows),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLITS=splits,
        EARLY=early,
        num_warps=4,
        launch_pdl=early,
    )
