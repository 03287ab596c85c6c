"""One step of Adafactor (https://arxiv.org/abs/1804.04235, algorithms 4 and 5), with clipping inside.

For a parameter p with gradient g, in fp32, at its t-th update, with R and C the running means over columns and rows:

    g = g * min(1, max_grad_norm / (norm of all gradients + 1e-6))
    R = R + t**decay_rate * (mean over columns of (g * g + eps1) - R)        for a matrix;
    C = C + t**decay_rate * (mean over rows of (g * g + eps1) - C)
    V = R C / mean(R)
    V = V + t**decay_rate * (g * g + eps1 - V)                               for a vector
    u = g / sqrt(V);  u = u / max(1, rms(u) / clip_threshold)
    p = p - lr * weight_decay * p - lr * u

where lr is multiplied by max(eps2, rms(p)) if steps are in proportion to the parameter (`scale_parameter`).

Rows and columns of a matrix of n x m take n + m numbers: they are fp32 and stay on the device, since 8 bits or another
place would save nothing that could be noticed. There is no first moment, which would take what the factors save.

It is PyTorch, one parameter at a time, some 20 launches each. Nothing waits for the device: where the gradients' norm
or the loss is not finite, each result is chosen there to be what it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.kernels.optimizer import measure

__all__ = ["AdafactorHyperparameters", "AdafactorState", "adafactor_step", "factor_shapes", "lay_out_factors"]


class AdafactorHyperparameters(NamedTuple):
    """Those of one group of parameters."""

    lr: float
    eps: tuple[float, float]
    clip_threshold: float
    decay_rate: float
    weight_decay: float
    scale_parameter: bool


@dataclass(frozen=True, eq=False)
class AdafactorState:
    """The state of all parameters.

    Attributes:
        params: The parameters.
        group_of: Group of each.
        factors: Second moments of all, one after the other, fp32.
        offsets: Where those of each parameter begin.
        steps: Updates made of each parameter, fp32 [num_params].
        norm: Norm of all gradients of the last step before clipping, fp32 scalar.
        scale: What the last step's gradients were multiplied by, fp32 scalar; -1 where the step changed nothing.
    """

    params: list[Tensor]
    group_of: list[int]
    factors: Tensor
    offsets: list[int]
    steps: Tensor
    norm: Tensor
    scale: Tensor

    def views(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter, as views, by the names of Transformers' Adafactor."""
        views, start = {"step": self.steps[index]}, self.offsets[index]
        for name, shape in factor_shapes(self.params[index].shape).items():
            views[name] = self.factors[start : start + shape.numel()].view(shape)
            start += shape.numel()
        return views

    def settle(self) -> None:
        """Nothing: all of it is on the device."""


def factor_shapes(shape: Sequence[int]) -> dict[str, torch.Size]:
    """Name -> shape of the second moments of a parameter: factored in its last two dimensions, if it has two."""
    if len(shape) < 2:
        return {"exp_avg_sq": torch.Size(shape)}
    return {"exp_avg_sq_row": torch.Size(shape[:-1]), "exp_avg_sq_col": torch.Size([*shape[:-2], shape[-1]])}


def lay_out_factors(params: Sequence[tuple[Tensor, int]]) -> AdafactorState:
    """The state of parameters, each with its group, before their first step; all of them on one device."""
    device = params[0][0].device
    sizes = [sum(shape.numel() for shape in factor_shapes(param.shape).values()) for param, _ in params]
    return AdafactorState(
        params=[param for param, _ in params],
        group_of=[group for _, group in params],
        factors=torch.zeros(sum(sizes), device=device),
        offsets=list(itertools.accumulate(sizes[:-1], initial=0)),
        steps=torch.zeros(len(params), device=device),
        norm=torch.zeros((), device=device),
        scale=torch.ones((), device=device),
    )


def adafactor_step(
    state: AdafactorState,
    grads: Sequence[Tensor | None],
    groups: Sequence[AdafactorHyperparameters],
    max_grad_norm: float | None,
    loss: Tensor | None,
) -> None:
    """Update `state.params` and their state; sets `state.norm` and `state.scale`.

    Args:
        state: What `lay_out_factors` made.
        grads: Gradient of each parameter, of its dtype, or None: that parameter is left alone.
        groups: Hyperparameters of each group.
        max_grad_norm: Gradients are clipped to this norm, all together; None or 0: never.
        loss: fp32 scalar on the device; where it is not finite the step changes nothing.
    """
    measure(state.norm, state.scale, grads, max_grad_norm, loss)
    finite = state.scale >= 0
    for index, grad in enumerate(grads):
        if grad is not None:
            state.steps[index].add_(finite)
            _update(state, index, grad, groups[state.group_of[index]], finite)


def _update(state: AdafactorState, index: int, grad: Tensor, group: AdafactorHyperparameters, finite: Tensor) -> None:
    param, views = state.params[index], state.views(index)
    # With a weight of 0, and nothing that is not finite beside it, a mean stays what it is.
    weight = torch.where(finite, views["step"].pow(group.decay_rate), 0.0)
    scaled = torch.where(finite, grad.float() * state.scale, 0.0)
    squared = scaled.square().add_(group.eps[0])
    if "exp_avg_sq" in views:
        update = scaled * views["exp_avg_sq"].lerp_(squared, weight).rsqrt()
    else:
        row = views["exp_avg_sq_row"].lerp_(squared.mean(dim=-1), weight)
        col = views["exp_avg_sq_col"].lerp_(squared.mean(dim=-2), weight)
        update = scaled * (row / row.mean(dim=-1, keepdim=True)).rsqrt().unsqueeze(-1)
        update *= col.rsqrt().unsqueeze(-2)
    del squared, scaled
    update /= (_rms(update) / group.clip_threshold).clamp(min=1.0)
    values = param.float()
    lr = group.lr * (_rms(values).clamp(min=group.eps[1]) if group.scale_parameter else 1.0)
    if group.weight_decay:
        update += values * group.weight_decay
    update *= lr
    param.copy_(torch.where(finite, values - update, values))


def _rms(values: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm / math.sqrt(values.numel())
