"""The code points of the 8-bit state: the signed dynamic map for the first moment, the unsigned for the second."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fourfold.kernels.optimizer_state import Maps
from fourfold.quantization.scales import dynamic_map

__all__ = ["state_maps", "unsigned_dynamic_map"]


@functools.cache
def unsigned_dynamic_map(device: torch.device) -> Tensor:
    """The unsigned dynamic map: fp32 [256], sorted, shared on `device`; not to be written to.

    As `fourfold.quantization.scales.dynamic_map`, without the sign and with its bit given to the fraction: 2**(7 - e)
    intervals for the decimal exponent -e.
    """
    values: list[float] = [0.0, 1.0]
    for exponent in range(7):
        boundaries = torch.linspace(0.1, 1, 2 ** (7 - exponent) + 1, dtype=torch.float32, device="cpu")
        values += (10 ** (-exponent) * ((boundaries[:-1] + boundaries[1:]) / 2.0)).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def state_maps(device: torch.device) -> Maps:
    """The maps of bitsandbytes' 8-bit optimizers."""
    return Maps(dynamic_map(device), unsigned_dynamic_map(device))
