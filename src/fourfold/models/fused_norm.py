"""The norm behind the last decoder layer, by the block's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourfold.kernels.norm import rms_norm, rms_norm_backward

__all__ = ["FusedNorm"]


class FusedNorm:
    """Mixin over a Transformers RMSNorm; a trained weight, or one of another dtype, takes the norm's own way."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.weight
        if weight.requires_grad or weight.dtype != hidden_states.dtype:
            own: Tensor = super().forward(hidden_states)  # type: ignore[misc]  # the norm's
            return own
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        out: Tensor = _Norm.apply(flat, weight, self.variance_epsilon)
        return out.view(hidden_states.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        return rms_norm_backward(grad.contiguous(), x, weight, rstd, None), None, None
