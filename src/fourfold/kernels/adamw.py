"""One step of AdamW for all parameters at once, with clipping and 32-bit or 8-bit moments.

For a parameter p with gradient g, in fp32 (https://arxiv.org/abs/1711.05101, algorithm 2):

    g = g * min(1, max_grad_norm / (norm of all gradients + 1e-6))
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * weight_decay * p - lr / (1 - beta1**t) * m / (sqrt(v / (1 - beta2**t)) + eps)

8-bit moments are codes in blocks of 256 that share a scale (https://arxiv.org/abs/2110.02861): an element is
map[code] * absmax[block], with the signed dynamic map for m and the unsigned one for v, and the nearest code is taken.

A step whose gradients' norm or loss is not finite changes nothing. On a GPU this is decided there: nothing in a step
waits for the device.

This is not a `torch.library` operator: the tensors are hundreds, each of which the dispatcher would check and wrap, and
nothing traces an optimizer's step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.kernels.availability import say_once, triton_refuses

__all__ = [
    "BLOCK_SIZE",
    "CHUNK_SIZE",
    "AdamWState",
    "Hyperparameters",
    "Maps",
    "Pack",
    "adamw_step",
    "adamw_step_reference",
    "lay_out",
]

logger = logging.getLogger(__name__)

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
        maps, thresholds: Code points, and the middles between them (padded to 256 with inf), fp32 [256].
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
    infinity = torch.full((1,), math.inf, device=device)
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
        thresholds=Maps(*(torch.cat([(points[1:] + points[:-1]) / 2, infinity]) for points in maps)),
        norm=torch.zeros((), device=device),
        scale=torch.ones((), device=device),
        chunk_tensor=torch.tensor(chunk_tensor, dtype=torch.int32, device=device),
        chunk_index=torch.tensor(chunk_index, dtype=torch.int32, device=device),
        table=torch.tensor(rows, dtype=torch.int64, device=device),
    )


def adamw_step(
    state: AdamWState,
    grads: Sequence[Tensor | None],
    groups: Sequence[Hyperparameters],
    max_grad_norm: float | None,
    loss: Tensor | None,
) -> None:
    """Update `state.params` and their state; sets `state.norm` and `state.scale`.

    Args:
        state: What `lay_out` made.
        grads: Gradient of each parameter, contiguous and of its dtype, or None: that parameter is left alone.
        groups: Hyperparameters of each group.
        max_grad_norm: Gradients are clipped to this norm, all together; None or 0: never.
        loss: fp32 scalar on the device; where it is not finite the step changes nothing.
    """
    if state.steps.device.type != "cpu":
        refusal = triton_refuses(state.steps)
        if refusal is None:
            from fourfold.kernels.adamw_triton import adamw_step_triton

            adamw_step_triton(state, grads, groups, max_grad_norm, loss)
            return
        say_once(logger, f"AdamW runs in PyTorch, one parameter at a time and slower than by its kernel: {refusal}")
    adamw_step_reference(state, grads, groups, max_grad_norm, loss)


def adamw_step_reference(
    state: AdamWState,
    grads: Sequence[Tensor | None],
    groups: Sequence[Hyperparameters],
    max_grad_norm: float | None,
    loss: Tensor | None,
) -> None:
    """`adamw_step` in PyTorch. It reads the norm, so on a GPU it waits for the device once."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads if grad is not None]
    state.norm.copy_(torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(()))
    finite = state.norm.isfinite() if loss is None else state.norm.isfinite() & loss.isfinite()
    if not finite.item():
        state.scale.fill_(-1.0)
        return
    state.scale.fill_(1.0)
    if max_grad_norm:
        state.scale.copy_((max_grad_norm / (state.norm + 1e-6)).clamp(max=1.0))
    steps = state.steps.tolist()
    for index, grad in enumerate(grads):
        if grad is not None:
            state.steps[index] += 1
            group = groups[state.group_of[index]]
            _update(state.params[index], grad.float() * state.scale, state, index, group, steps[index] + 1)


def _update(param: Tensor, grad: Tensor, state: AdamWState, index: int, group: Hyperparameters, step: float) -> None:
    views = state.views(index)
    if state.bits[index] == 32:
        first, second = views["exp_avg"], views["exp_avg_sq"]
    else:
        first = _decode(views["state1"], views["absmax1"], state.maps.first)
        second = _decode(views["state2"], views["absmax2"], state.maps.second)
    first.lerp_(grad, 1 - group.beta1)
    second.mul_(group.beta2).addcmul_(grad, grad, value=1 - group.beta2)
    denominator = (second.sqrt() / math.sqrt(1 - group.beta2**step)).add_(group.eps)
    updated = param.float()  # the parameter itself where it is fp32
    # What is taken away, and not what is left: 1 - lr * weight_decay in fp32 is wrong to one side, at every step.
    updated.sub_(updated, alpha=group.lr * group.weight_decay)
    updated.addcdiv_(first, denominator, value=-group.lr / (1 - group.beta1**step))
    if updated is not param:
        param.copy_(updated)
    if state.bits[index] == 8:
        _encode(first, views["state1"], views["absmax1"], state.thresholds.first)
        _encode(second, views["state2"], views["absmax2"], state.thresholds.second)


def _blocks(values: Tensor) -> Tensor:
    """[num_blocks, BLOCK_SIZE], the last block filled with zeros."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)


def _decode(codes: Tensor, absmax: Tensor, points: Tensor) -> Tensor:
    values = points[_blocks(codes).int()] * absmax[:, None]
    return values.view(-1)[: codes.numel()].view(codes.shape)


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, thresholds: Tensor) -> None:
    blocks = _blocks(values)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    inverse = torch.where(absmax >= SMALLEST_ABSMAX, 1.0 / absmax, 0.0)
    nearest = torch.bucketize(blocks * inverse[:, None], thresholds[:-1], out_int32=True)
    codes.copy_(nearest.view(-1)[: codes.numel()].view(codes.shape))
