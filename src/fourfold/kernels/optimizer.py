"""One step of AdamW or Lion for all parameters at once, with clipping and 32-bit or 8-bit moments.

For a parameter p with gradient g, in fp32,

    g = g * min(1, max_grad_norm / (norm of all gradients + 1e-6))

and then by AdamW (https://arxiv.org/abs/1711.05101, algorithm 2)

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    p = p - lr * weight_decay * p - lr / (1 - beta1**t) * m / (sqrt(v / (1 - beta2**t)) + eps)

or by Lion (https://arxiv.org/abs/2302.06675, algorithm 2)

    p = p - lr * weight_decay * p - lr * sign(beta1 * m + (1 - beta1) * g)
    m = beta2 * m + (1 - beta2) * g

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

import torch
from torch import Tensor, distributed

from fourfold.kernels.availability import say_once, triton_refuses
from fourfold.kernels.optimizer_state import BLOCK_SIZE, MOMENTS, SMALLEST_ABSMAX, Hyperparameters, OptimizerState
from fourfold.kernels.shards import sum_over

__all__ = ["decode_moment", "encode_moment", "measure", "optimizer_step", "optimizer_step_reference"]

logger = logging.getLogger(__name__)


def optimizer_step(
    state: OptimizerState,
    grads: Sequence[Tensor | None],
    groups: Sequence[Hyperparameters],
    max_grad_norm: float | None,
    loss: Tensor | None,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Update `state.params` and their state; sets `state.norm` and `state.scale`.

    Args:
        state: What `lay_out` made.
        grads: Gradient of each parameter, contiguous and of its dtype, or None: that parameter is left alone.
        groups: Hyperparameters of each group.
        max_grad_norm: Gradients are clipped to this norm, all together; None or 0: never.
        loss: fp32 scalar on the device; where it is not finite the step changes nothing.
        group: The processes that hold a part each of the parameters; None: they are whole. The norm is that of all.
    """
    if state.steps.device.type != "cpu":
        refusal = triton_refuses(state.steps)
        if refusal is None:
            from fourfold.kernels.optimizer_triton import optimizer_step_triton

            optimizer_step_triton(state, grads, groups, max_grad_norm, loss, group)
            return
        say_once(
            logger, f"The optimizer runs in PyTorch, one parameter at a time, slower than by its kernel: {refusal}"
        )
    optimizer_step_reference(state, grads, groups, max_grad_norm, loss, group)


def optimizer_step_reference(
    state: OptimizerState,
    grads: Sequence[Tensor | None],
    groups: Sequence[Hyperparameters],
    max_grad_norm: float | None,
    loss: Tensor | None,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """`optimizer_step` in PyTorch. It reads the scale, so on a GPU it waits for the device."""
    measure(state.norm, state.scale, grads, max_grad_norm, loss, group)
    if state.scale.item() < 0:
        return
    steps = state.steps.tolist()
    for index, grad in enumerate(grads):
        if grad is not None:
            state.steps[index] += 1
            own = groups[state.group_of[index]]
            _update(state.params[index], grad.float() * state.scale, state, index, own, steps[index] + 1)


def measure(
    norm: Tensor,
    scale: Tensor,
    grads: Sequence[Tensor | None],
    max_grad_norm: float | None,
    loss: Tensor | None,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Set `norm` to that of all gradients, and `scale` to what they are to be multiplied by, or -1: change nothing."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads if grad is not None]
    norm.copy_(torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(()))
    if group is not None:
        norm.copy_(sum_over(group, norm.double().square()).sqrt())
    finite = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
    scale.copy_(torch.where(finite, ((max_grad_norm or math.inf) / (norm + 1e-6)).clamp(max=1.0), -1.0))


def _update(
    param: Tensor, grad: Tensor, state: OptimizerState, index: int, group: Hyperparameters, step: float
) -> None:
    # Paged moments are brought whole: copies that the host waits for, and none where they are resident.
    views = {name: view.to(param.device) for name, view in state.views(index).items() if name != "step"}
    if state.kinds[index].bits == 32:
        moments = [views[name] for name in MOMENTS[state.rule]]
    else:
        numbered = [(views[f"state{n}"], views[f"absmax{n}"]) for n in range(1, len(MOMENTS[state.rule]) + 1)]
        moments = [decode_moment(*each, points) for each, points in zip(numbered, state.maps, strict=False)]
    updated = param.float()  # the parameter itself where it is fp32
    # What is taken away, and not what is left: 1 - lr * weight_decay in fp32 is wrong to one side, at every step.
    updated.sub_(updated, alpha=group.lr * group.weight_decay)
    _RULES[state.rule](updated, moments, grad, group, step)
    if updated is not param:
        param.copy_(updated)
    if state.kinds[index].bits == 8:
        for each, moment, thresholds in zip(numbered, moments, state.thresholds, strict=False):
            _encode(moment, *each, thresholds)
    if state.kinds[index].paged:
        homes = state.views(index)
        for name, view in views.items():
            homes[name].copy_(view)


def _adamw(param: Tensor, moments: list[Tensor], grad: Tensor, group: Hyperparameters, step: float) -> None:
    first, second = moments
    first.lerp_(grad, 1 - group.beta1)
    second.mul_(group.beta2).addcmul_(grad, grad, value=1 - group.beta2)
    denominator = (second.sqrt() / math.sqrt(1 - group.beta2**step)).add_(group.eps)
    param.addcdiv_(first, denominator, value=-group.lr / (1 - group.beta1**step))


def _lion(param: Tensor, moments: list[Tensor], grad: Tensor, group: Hyperparameters, step: float) -> None:
    (first,) = moments
    param.sub_(first.lerp(grad, 1 - group.beta1).sign_(), alpha=group.lr)
    first.lerp_(grad, 1 - group.beta2)


# What a rule does to a parameter that has decayed, in fp32, and to its moments.
_RULES: dict[str, Callable[[Tensor, list[Tensor], Tensor, Hyperparameters, float], None]] = {
    "adamw": _adamw,
    "lion": _lion,
}


def _blocks(values: Tensor) -> Tensor:
    """[num_blocks, BLOCK_SIZE], the last block filled with zeros."""
    flat = values.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK_SIZE)).view(-1, BLOCK_SIZE)


def decode_moment(codes: Tensor, absmax: Tensor, points: Tensor) -> Tensor:
    """fp32 values, of the shape of `codes`, of an 8-bit moment; `absmax` has one scale a block, `points` its map."""
    values = points[_blocks(codes).int()] * absmax[:, None]
    return values.view(-1)[: codes.numel()].view(codes.shape)


def encode_moment(values: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8 of the shape of `values`, and scales, fp32, of a moment: the nearest of `points`, blockwise."""
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    absmax = torch.empty(-(-values.numel() // BLOCK_SIZE), dtype=torch.float32, device=values.device)
    if values.numel():
        _encode(values, codes, absmax, torch.cat([(points[1:] + points[:-1]) / 2, points.new_full((1,), -math.inf)]))
    return codes, absmax


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, thresholds: Tensor) -> None:
    blocks = _blocks(values)
    torch.amax(blocks.abs(), dim=1, out=absmax)
    inverse = torch.where(absmax >= SMALLEST_ABSMAX, 1.0 / absmax, 0.0)
    nearest = torch.bucketize(blocks * inverse[:, None], thresholds[:-1], out_int32=True)
    codes.copy_(nearest.view(-1)[: codes.numel()].view(codes.shape))
