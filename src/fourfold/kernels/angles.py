"""The angles of the rotary embedding: cos and sin of each position times each frequency, in one pass.

Transformers makes them of seven operations on small tensors. The first layer waits for them, and a GPU is done with
each long before the host has launched the next.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import triton_refuses

__all__ = ["rotary_angles", "rotary_angles_reference"]

torch.library.define(
    "fourfold::rotary_angles",
    "(Tensor position_ids, Tensor inv_freq, float scaling, ScalarType dtype) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.rotary_angles.default


def rotary_angles(position_ids: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position times frequency, each angle twice, as RoFormer's rotation takes them
    (https://arxiv.org/abs/2104.09864; the order of the columns is Transformers').

    Args:
        position_ids: int32 or int64 [batch, seq].
        inv_freq: fp32 [rotary_dim / 2], the frequencies.
        scaling: What cos and sin are multiplied by.
        dtype: Of the results. They are computed in fp32 and rounded once.

    Returns:
        cos and sin, contiguous [batch, seq, rotary_dim], the second half equal to the first.
    """
    return cast("tuple[Tensor, Tensor]", _op(position_ids, inv_freq, scaling, dtype))


def rotary_angles_reference(
    position_ids: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`rotary_angles` in PyTorch."""
    angles = position_ids[..., None].float() * inv_freq.float()
    angles = torch.cat([angles, angles], dim=-1)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def _cuda(position_ids: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if triton_refuses(position_ids) is not None:
        return rotary_angles_reference(position_ids, inv_freq, scaling, dtype)
    from fourfold.kernels import angles_triton

    return angles_triton.rotary_angles(position_ids, inv_freq, scaling, dtype)


def _fake(position_ids: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (*position_ids.shape, 2 * inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)


torch.library.impl("fourfold::rotary_angles", "default", rotary_angles_reference)
torch.library.impl("fourfold::rotary_angles", "cuda", _cuda)
torch.library.register_fake("fourfold::rotary_angles", _fake)
