"""What a step of AdamW works on: parameters, their moments in flat memory, and where each part lies."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BLOCK_SIZE",
    "CHUNK_SIZE",
    "SMALLEST_ABSMAX",
    "AdamWState",
    "Hyperparameters",
    "Maps",
    "Pack",
    "lay_out",
]

BLOCK_SIZE = 256
"""Elements that share a scale of the 8-bit state."""

CHUNK_SIZE = 2048
"""Elements that one program of a kernel works on."""

# Below it the reciprocal of a block's scale is not finite; such a block is zero.
SMALLEST_ABSMAX = 1.2e-38

Allocate = Callable[[int, torch.dtype, torch.device], Tensor]


class Hyperparameters(NamedTuple):
    """Those of one group of parameters."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Maps(NamedTuple):
    """The code points of the two moments, fp32 [256], sorted."""

    first: Tensor
    second: Tensor


class Pack(NamedTuple):
    """Parameters that one launch updates: of one dtype, with one kind of state; next to each other in the lists."""

    dtype: torch.dtype
    bits: int
    first_chunk: int
    num_chunks: int


@dataclass(frozen=True)
class AdamWState:
    """The state of all parameters, in one buffer for each kind.

    Attributes:
        params: The parameters, pack by pack. Contiguous.
        group_of: Group of each parameter.
        bits: 8 or 32 for each parameter.
        offsets: Where each parameter's moments begin in the buffers of its kind; whole blocks.
        packs: See `Pack`.
        steps: Updates made of each parameter, fp32 [num_params].
        exp_avg, exp_avg_sq: Moments in 32 bits, fp32.
        state1, state2: Moments in 8 bits, uint8.
        absmax1, absmax2: Their scales, fp32, one for BLOCK_SIZE elements.
        maps, thresholds: Code points, and the middles between them, ascending, then -inf, fp32 [256].
        norm: Norm of all gradients of the last step before clipping, fp32 scalar.
        scale: What the last step's gradients were multiplied by, fp32 scalar; -1 where the step changed nothing.
        chunk_tensor, chunk_index: Which parameter a chunk belongs to, and which of its chunks it is, int32.
        table: int64 [num_params, 3]: number of elements, offset, group.
    """

    params: list[Tensor]
    group_of: list[int]
    bits: list[int]
    offsets: list[int]
    packs: list[Pack]
    steps: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    state1: Tensor
    state2: Tensor
    absmax1: Tensor
    absmax2: Tensor
    maps: Maps
    thresholds: Maps
    norm: Tensor
    scale: Tensor
    chunk_tensor: Tensor
    chunk_index: Tensor
    table: Tensor

    def views(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter, as views, by the names of torch (32-bit) and bitsandbytes (8-bit)."""
        param, start = self.params[index], self.offsets[index]
        elements = slice(start, start + param.numel())
        views = {"step": self.steps[index]}
        if self.bits[index] == 32:
            moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        else:
            moments = {"state1": self.state1, "state2": self.state2}
            blocks = slice(start // BLOCK_SIZE, start // BLOCK_SIZE + _num_blocks(param))
            views |= {"absmax1": self.absmax1[blocks], "absmax2": self.absmax2[blocks]}
        return views | {name: moment[elements].view(param.shape) for name, moment in moments.items()}


def _num_blocks(param: Tensor) -> int:
    return -(-param.numel() // BLOCK_SIZE)


def lay_out(params: Sequence[tuple[Tensor, int, int]], maps: Maps, allocate: Allocate) -> AdamWState:
    """The state of `params` before their first step.

    Args:
        params: Parameter, group, and bits of its state (8 or 32). Contiguous, of fp32, bf16 or fp16, on one device.
        maps: Code points of the 8-bit state, on that device.
        allocate: Gives zeros for the moments: (number of elements, dtype, device) -> flat tensor.
    """
    ordered = sorted(params, key=lambda entry: (str(entry[0].dtype), entry[2]))
    device = ordered[0][0].device
    ends = {8: 0, 32: 0}
    offsets, packs = list[int](), list[Pack]()
    chunk_tensor, chunk_index = list[int](), list[int]()
    for index, (param, _, bits) in enumerate(ordered):
        offsets.append(ends[bits])
        ends[bits] += _num_blocks(param) * BLOCK_SIZE
        chunks = range(-(-param.numel() // CHUNK_SIZE))
        if not packs or packs[-1][:2] != (param.dtype, bits):
            packs.append(Pack(param.dtype, bits, len(chunk_tensor), 0))
        packs[-1] = packs[-1]._replace(num_chunks=packs[-1].num_chunks + len(chunks))
        chunk_tensor += [index] * len(chunks)
        chunk_index += chunks
    rows = [(param.numel(), offset, group) for (param, group, _), offset in zip(ordered, offsets, strict=True)]
    padding = torch.full((1,), -math.inf, device=device)
    return AdamWState(
        params=[param for param, _, _ in ordered],
        group_of=[group for _, group, _ in ordered],
        bits=[bits for _, _, bits in ordered],
        offsets=offsets,
        packs=packs,
        steps=torch.zeros(len(ordered), device=device),
        exp_avg=allocate(ends[32], torch.float32, device),
        exp_avg_sq=allocate(ends[32], torch.float32, device),
        state1=allocate(ends[8], torch.uint8, device),
        state2=allocate(ends[8], torch.uint8, device),
        absmax1=allocate(ends[8] // BLOCK_SIZE, torch.float32, device),
        absmax2=allocate(ends[8] // BLOCK_SIZE, torch.float32, device),
        maps=maps,
        thresholds=Maps(*(torch.cat([(points[1:] + points[:-1]) / 2, padding]) for points in maps)),
        norm=torch.zeros((), device=device),
        scale=torch.ones((), device=device),
        chunk_tensor=torch.tensor(chunk_tensor, dtype=torch.int32, device=device),
        chunk_index=torch.tensor(chunk_index, dtype=torch.int32, device=device),
        table=torch.tensor(rows, dtype=torch.int64, device=device),
    )
