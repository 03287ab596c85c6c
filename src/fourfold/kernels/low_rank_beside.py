"""An activation's product with LoRA's A, which stands beside it and is kept alone as well.

The product is so narrow that it takes the time of reading the activation. Where the activation must be moved to where
there is room beside it, the kernel that moves it multiplies what passes through.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.low_rank import columns_alone, columns_refuse, extend, fill_columns, new_extended

__all__ = ["fill_low_rank_", "fill_low_rank_reference_", "low_rank_beside", "low_rank_beside_reference"]

torch.library.define(
    "fourfold::low_rank_beside",
    "(Tensor x, Tensor projection) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::fill_low_rank_",
    "(Tensor(a!) extended, int width, Tensor projection) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.low_rank_beside.default
_fill_op = torch.ops.fourfold.fill_low_rank_.default

# What the kernel takes. More ranks need more shared memory than the GPU has; of fewer numbers, launches cost as much
# as reading them; fp32 has no tensor cores of its precision.
_MAX_RANK = 64
_MIN_ROWS, _MIN_WIDTH = 1024, 1024
_DTYPES = (torch.bfloat16, torch.float16)


def low_rank_beside(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """`x` with the columns `x @ projection.T` behind it, in new memory, and those columns alone.

    Args:
        x: [M, K], last stride 1.
        projection: [R, K] of x's dtype, any strides.

    Returns:
        [M, K + R] of x's dtype, last stride 1; and contiguous [M, R] in memory of its own, the product, accumulated in
        fp32 and rounded once.
    """
    return cast("tuple[Tensor, Tensor]", _op(x, projection))


def low_rank_beside_reference(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    """`low_rank_beside` in PyTorch."""
    extended = extend(x, projection)
    return extended, columns_alone(extended, x.shape[1])


def fill_low_rank_(extended: Tensor, width: int, projection: Tensor) -> Tensor:
    """`low_rank_beside` in the activation's own memory: writes its columns behind it, and returns them alone.

    Args:
        extended: [M, width + R]: the activation, and room; last stride 1.
        projection: [R, width] of its dtype, any strides.

    Returns:
        Contiguous [M, R] in memory of its own, the product, accumulated in fp32 and rounded once.
    """
    return cast(Tensor, _fill_op(extended, width, projection))


def fill_low_rank_reference_(extended: Tensor, width: int, projection: Tensor) -> Tensor:
    """`fill_low_rank_` in PyTorch."""
    fill_columns(extended, width, projection)
    return columns_alone(extended, width)


def _new(x: Tensor, projection: Tensor) -> Tensor:
    # Not len(x), which would fix a compiled program to one number of rows.
    return new_extended(x, x.shape[0], x.shape[1], projection.shape[0])


def _is_taken(x: Tensor, projection: Tensor) -> bool:
    """Whether the kernel takes these."""
    is_large = len(x) >= _MIN_ROWS and x.shape[1] >= _MIN_WIDTH
    is_narrow = 0 < len(projection) <= _MAX_RANK
    return is_large and is_narrow and x.dtype in _DTYPES and columns_refuse(x, projection) is None


def _cuda(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    if not _is_taken(x, projection):
        return low_rank_beside_reference(x, projection)
    from fourfold.kernels import low_rank_beside_triton

    extended = _new(x, projection)
    return extended, low_rank_beside_triton.low_rank_beside(x, projection, extended)


def _fill_cuda(extended: Tensor, width: int, projection: Tensor) -> Tensor:
    x = extended[:, :width]
    if not _is_taken(x, projection):
        return fill_low_rank_reference_(extended, width, projection)
    from fourfold.kernels import low_rank_beside_triton

    return low_rank_beside_triton.low_rank_beside(x, projection, extended, in_place=True)


def _fake(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    return _new(x, projection), x.new_empty(x.shape[0], projection.shape[0])


def _fill_fake(extended: Tensor, _width: int, projection: Tensor) -> Tensor:
    return extended.new_empty(extended.shape[0], projection.shape[0])


torch.library.impl("fourfold::low_rank_beside", "default", low_rank_beside_reference)
torch.library.impl("fourfold::low_rank_beside", "cuda", _cuda)
torch.library.register_fake("fourfold::low_rank_beside", _fake)
torch.library.impl("fourfold::fill_low_rank_", "default", fill_low_rank_reference_)
torch.library.impl("fourfold::fill_low_rank_", "cuda", _fill_cuda)
torch.library.register_fake("fourfold::fill_low_rank_", _fill_fake)
