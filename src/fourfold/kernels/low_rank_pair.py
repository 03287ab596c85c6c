"""Both low-rank products of a gradient at once: [dY sB], which stands beside it, and the sums that dB is made of.

Both are so narrow that they take the time of reading dY. cuBLAS reads it for each; a kernel reads it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.low_rank import columns_refuse, fill_columns, low_rank_grad, working_dtype

__all__ = ["low_rank_pair_", "low_rank_pair_reference_"]

torch.library.define(
    "fourfold::low_rank_pair_",
    "(Tensor(a!) extended, int width, Tensor up, Tensor low, int[] begins, float[] scalings) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.low_rank_pair_.default

# What the kernel takes. With 64 ranks, its parts of the product, written and read, would be as many bytes as a second
# reading of the gradient; of fewer numbers, launches cost as much as that. fp32 has no tensor cores of its precision.
_MAX_RANK = 32
_MIN_ROWS, _MIN_WIDTH = 4096, 2048
_DTYPES = (torch.bfloat16, torch.float16)


def low_rank_pair_(
    extended: Tensor,
    width: int,
    up: Tensor,
    low: Tensor,
    begins: Sequence[int] = (),
    scalings: Sequence[float] = (1.0,),
) -> Tensor:
    """Fills the last columns of a gradient with its product with `up`, and gives its own product with `low`.

        extended[:, width:] <- extended[:, :width] @ up.T
        sums                 = extended[:, :width].T @ low * scaling

    both accumulated in fp32, and the first rounded once.

    Args:
        extended: [M, width + R]: the gradient of the outputs of a group of linear layers, and room; last stride 1.
        up: [R, width] of extended's dtype, any strides.
        low: [M, R] of extended's dtype, last stride 1.
        begins: With two or three layers that share R equally, the columns with which the second begins, and the third:
            `up` is zero where a row is of another layer's ranks than a column, and sums like these are not wanted.
            Empty for one layer.
        scalings: What the sums of each layer are multiplied by.

    Returns:
        Contiguous fp32 [width, R / layers] (float64 for float64 inputs): each layer's rows are the sums with its own
        columns of `low`, the gradient of its B.
    """
    return cast(Tensor, _op(extended, width, up, low, begins, scalings))


def low_rank_pair_reference_(
    extended: Tensor, width: int, up: Tensor, low: Tensor, begins: Sequence[int], scalings: Sequence[float]
) -> Tensor:
    """`low_rank_pair_` in PyTorch, by two products."""
    fill_columns(extended, width, up)
    sums = low_rank_grad(extended[:, :width], low)
    if not begins:
        return sums.mul_(scalings[0])
    rank = len(up) // len(scalings)
    out = sums.new_empty(width, rank)
    for layer, (begin, end) in enumerate(zip((0, *begins), (*begins, width), strict=True)):
        own = sums[begin:end, layer * rank : (layer + 1) * rank]
        torch.mul(own, scalings[layer], out=out[begin:end])
    return out


def _cuda(
    extended: Tensor, width: int, up: Tensor, low: Tensor, begins: Sequence[int], scalings: Sequence[float]
) -> Tensor:
    rank = len(up) // (len(begins) + 1)
    is_large = len(extended) >= _MIN_ROWS and width >= _MIN_WIDTH
    if is_large and rank <= _MAX_RANK and extended.dtype in _DTYPES and columns_refuse(extended, low) is None:
        from fourfold.kernels import low_rank_pair_triton

        tile = low_rank_pair_triton.tile_for(width, rank, begins, extended.device)
        if tile is not None:
            return low_rank_pair_triton.low_rank_pair_(extended, width, up, low, begins, scalings, tile)
    return low_rank_pair_reference_(extended, width, up, low, begins, scalings)


def _fake(
    extended: Tensor, width: int, up: Tensor, _low: Tensor, _begins: Sequence[int], scalings: Sequence[float]
) -> Tensor:
    return extended.new_empty(width, len(up) // len(scalings), dtype=working_dtype(extended.dtype))


torch.library.impl("fourfold::low_rank_pair_", "default", low_rank_pair_reference_)
torch.library.impl("fourfold::low_rank_pair_", "cuda", _cuda)
torch.library.register_fake("fourfold::low_rank_pair_", _fake)
