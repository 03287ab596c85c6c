"""AdamW over one flat state, updated for all parameters at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from fourfold.optimizers.moments import MomentOptimizer, StateOptions

__all__ = ["AdamW"]


class AdamW(MomentOptimizer):
    """AdamW (https://arxiv.org/abs/1711.05101) with 32-bit or blockwise 8-bit state (https://arxiv.org/abs/2110.02861).

    Its numbers are those of `torch.optim.AdamW` after `clip_grad_norm_`, and those of bitsandbytes' AdamW8bit, with
    three launches a step, and one for each page of paged state. Parameters may be fp32, bf16 or fp16; the arithmetic is
    fp32.

    Args:
        params: Parameters or groups of them, all on one device. A group may have its own lr, betas, eps, weight_decay.
        lr: Learning rate; schedulers may change it each step.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        options: How state is kept, and max_grad_norm: see `StateOptions` and `OwnOptimizer`.

    Raises:
        ConfigError: A value out of its range, or parameters that are sparse, of another dtype, not contiguous or on
            several devices.
    """

    rule = "adamw"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[StateOptions],
    ) -> None:
        self._require("eps", eps, eps >= 0, "0 or more")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)
