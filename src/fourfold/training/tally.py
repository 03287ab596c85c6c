"""What a trainer counts between two logs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fourfold.training.loss import SupervisedLoss

__all__ = ["Tally"]


@dataclass
class Tally:
    """What was counted since the last log, as tensors on the device, so that counting never waits for it."""

    loss_sum: torch.Tensor | float = 0.0
    num_supervised: torch.Tensor | int = 0
    num_correct: torch.Tensor | int = 0
    num_tokens: torch.Tensor | int = 0

    def add(self, loss: SupervisedLoss, num_tokens: torch.Tensor | int) -> None:
        self.loss_sum = self.loss_sum + loss.loss_sum.detach()
        self.num_supervised = self.num_supervised + loss.num_tokens
        self.num_correct = self.num_correct + loss.num_correct
        self.num_tokens = self.num_tokens + num_tokens

    def sums(self) -> dict[str, torch.Tensor | float]:
        """All of it by name; `Tally(**sums)` counts on from there."""
        return dict(vars(self))
