"""An activation and its product with LoRA's A, which stands beside it and is kept alone as well.

The product is so narrow that it takes the time of reading the activation. A kernel that moves the activation to where
there is room beside it multiplies what passes through it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.low_rank import columns_alone, columns_refuse, extend, new_extended

__all__ = ["low_rank_beside", "low_rank_beside_reference"]

torch.library.define(
    "fourfold::low_rank_beside",
    "(Tensor x, Tensor projection) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.low_rank_beside.default

# What the kernel takes. More ranks need more shared memory than some GPUs have; of fewer numbers, launches cost as much
# as reading them; fp32 has no tensor cores of its precision.
_MAX_RANK = 32
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


def _new(x: Tensor, projection: Tensor) -> Tensor:
    # Not len(x), which would fix a compiled program to one number of rows.
    return new_extended(x, x.shape[0], x.shape[1], projection.shape[0])


def _cuda(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    is_large = len(x) >= _MIN_ROWS and x.shape[1] >= _MIN_WIDTH
    if is_large and 0 < len(projection) <= _MAX_RANK and x.dtype in _DTYPES and columns_refuse(x, projection) is None:
        from fourfold.kernels import low_rank_beside_triton

        return low_rank_beside_triton.low_rank_beside(x, projection, _new(x, projection))
    return low_rank_beside_reference(x, projection)


def _fake(x: Tensor, projection: Tensor) -> tuple[Tensor, Tensor]:
    return _new(x, projection), x.new_empty(x.shape[0], projection.shape[0])


torch.library.impl("fourfold::low_rank_beside", "default", low_rank_beside_reference)
torch.library.impl("fourfold::low_rank_beside", "cuda", _cuda)
torch.library.register_fake("fourfold::low_rank_beside", _fake)
