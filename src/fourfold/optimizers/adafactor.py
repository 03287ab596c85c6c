"""Adafactor: second moments by row and by column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.kernels.adafactor import AdafactorHyperparameters, AdafactorState, adafactor_step, lay_out_factors
from fourfold.optimizers.base import OwnOptimizer

__all__ = ["Adafactor"]


class Adafactor(OwnOptimizer):
    """Adafactor (https://arxiv.org/abs/1804.04235) without a first moment, of all optimizers the one with least state.

    Its numbers are those of Transformers' Adafactor with relative_step=False, which is what the Trainer makes of
    `optim: adafactor`, after `clip_grad_norm_`. Parameters may be fp32, bf16 or fp16; the arithmetic is fp32.

    Args:
        params: Parameters or groups of them, all on one device. A group may have its own values of the following.
        lr: Learning rate; schedulers may change it each step.
        eps: Added to squared gradients; and the least rms of a parameter where steps are in proportion to it.
        clip_threshold: Largest rms of an update before it is multiplied by lr.
        decay_rate: At the t-th step, t**decay_rate of a second moment is new.
        weight_decay: Decoupled weight decay.
        scale_parameter: Whether steps are in proportion to the parameter's rms.
        max_grad_norm: See `OwnOptimizer`.

    Raises:
        ConfigError: A value out of its range, or parameters that are sparse, of another dtype, not contiguous or on
            several devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        scale_parameter: bool = False,
        *,
        max_grad_norm: float | None = None,
    ) -> None:
        for key, value, holds, allowed in (
            ("lr", lr, lr >= 0, "0 or more"),
            ("eps", eps, all(each > 0 for each in eps), "above 0"),
            ("clip_threshold", clip_threshold, clip_threshold > 0, "above 0"),
            ("decay_rate", decay_rate, -1 <= decay_rate <= 0, "-1 to 0"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
        ):
            self._require(key, value, holds, allowed)
        hyperparameters = AdafactorHyperparameters(lr, eps, clip_threshold, decay_rate, weight_decay, scale_parameter)
        super().__init__(params, hyperparameters._asdict(), max_grad_norm)

    def _lay_out(self, params: Sequence[tuple[Tensor, int]]) -> AdafactorState:
        if self._group is not None:
            raise ConfigError(
                "Adafactor's means over rows and columns are those of whole parameters, and these are sharded",
                found="FSDP2",
                allowed="adamw, adamw_8bit, lion or another optimizer with moments of each element",
            )
        return lay_out_factors(params)

    def _update(self, grads: Sequence[Tensor | None]) -> None:
        state = self._flat()
        assert isinstance(state, AdafactorState)
        keys = AdafactorHyperparameters._fields
        groups = [AdafactorHyperparameters(**{key: group[key] for key in keys}) for group in self.param_groups]
        adafactor_step(state, grads, groups, self.max_grad_norm, self.watched_loss)
