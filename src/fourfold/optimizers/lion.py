"""Lion over one flat state, updated for all parameters at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

from fourfold.optimizers.moments import MomentOptimizer, StateOptions

__all__ = ["Lion"]


class Lion(MomentOptimizer):
    """Lion (https://arxiv.org/abs/2302.06675) with 32-bit or blockwise 8-bit state, half of what AdamW keeps.

    Its numbers are those of bitsandbytes' Lion and Lion8bit. All steps are of one size, so that lr is a third to a
    tenth of AdamW's, and weight_decay as many times larger. Parameters may be fp32, bf16 or fp16; the arithmetic is
    fp32.

    Args:
        params: Parameters or groups of them, all on one device. A group may have its own lr, betas, weight_decay.
        lr: Learning rate; schedulers may change it each step.
        betas: Share of the moment in the direction of a step, and decay of the moment.
        weight_decay: Decoupled weight decay.
        options: How state is kept, and max_grad_norm: see `StateOptions` and `OwnOptimizer`.

    Raises:
        ConfigError: A value out of its range, or parameters that are sparse, of another dtype, not contiguous or on
            several devices.
    """

    rule = "lion"

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, **options)
