"""The nearest code as the update kernel finds it, alone, for tests of it in the interpreter and on a GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.optimizer_state import Entry, lay_out
from fourfold.kernels.optimizer_triton import nearest_code
from fourfold.optimizers.maps import state_maps

BLOCK = 1024


@triton.jit
def _kernel(value_ptr, code_ptr, numel, threshold_ptr, signed: tl.constexpr, block: tl.constexpr):
    offsets = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(value_ptr + offsets, mask=offsets < numel, other=0.0)
    codes = nearest_code(values, threshold_ptr, signed)
    tl.store(code_ptr + offsets, codes.to(tl.uint8), mask=offsets < numel)


def thresholds(device: torch.device, signed: bool) -> Tensor:
    """fp32 [256] as the state holds them; the last is padding."""
    param = torch.zeros(1, device=device)
    both = lay_out([Entry(param, 0, 8)], state_maps(device))
    return both.thresholds.first if signed else both.thresholds.second


def nearest_codes(values: Tensor, table: Tensor, signed: bool) -> Tensor:
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    numel = values.numel()
    _kernel[(triton.cdiv(numel, BLOCK),)](values, codes, numel, table, signed=signed, block=BLOCK)
    return codes


def wanted_codes(values: Tensor, table: Tensor) -> Tensor:
    """By a search in the table, of PyTorch's."""
    return torch.bucketize(values, table[:-1], out_int32=True).to(torch.uint8)
