"""Tensors of which each process holds a part, seen from one: torch's DTensor, as FSDP2 makes them, or a parameter that
DeepSpeed's ZeRO-3 has emptied, with the part as its attribute `ds_tensor`.

A kernel never meets a DTensor. Whoever launches one takes the part that is here, and sums over the processes what has
to be a sum over the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["group_of", "is_sharded", "local_part", "sum_over"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is one of them. One process never has any, and does not import torch's module of DTensors."""
    if hasattr(tensor, "ds_tensor"):
        return True
    if not distributed.is_available() or not distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """What of `tensor` this process holds, in its memory; all of one that is not sharded.

    ZeRO-3's is flat, filled up to the size of the others, and on the CPU where it is offloaded.
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    if hasattr(sharded, "ds_tensor"):
        part: Tensor = sharded.ds_tensor
        return part
    with torch.no_grad():
        local: Tensor = sharded.to_local()
    return local


def group_of(tensor: Tensor) -> distributed.ProcessGroup | None:
    """The processes that share `tensor`; None where each has its own."""
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    group: distributed.ProcessGroup = sharded.device_mesh.get_group()
    return group


def sum_over(group: distributed.ProcessGroup | None, values: Tensor) -> Tensor:
    """`values` summed over the processes of `group`, in place; as they are without one. The host does not wait."""
    if group is not None:
        distributed.all_reduce(values, group=group)
    return values
