"""Loss on held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fourfold.errors import DataError
from fourfold.evaluation.token_loss import row_losses
from fourfold.inference import eval_mode

__all__ = ["ValidationLoss", "validation_loss"]


@dataclass(frozen=True)
class ValidationLoss:
    """Loss on held-out rows.

    Attributes:
        loss: Mean negative log likelihood of a supervised token, in nats.
        num_tokens: Supervised tokens.
        row_losses: Summed loss of each row, in nats.
        row_tokens: Supervised tokens of each row.
    """

    loss: float
    num_tokens: int
    row_losses: list[float] = field(default_factory=list, repr=False)
    row_tokens: list[int] = field(default_factory=list, repr=False)


def validation_loss(
    model: Any,
    dataset: Sequence[Any],
    collator: Callable[[list[Any]], dict[str, Any]],
    batch_size: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> ValidationLoss:
    """Mean cross entropy over all supervised tokens of all rows: it does not depend on the batch size.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        dataset: Rows that the collator takes, packed or not.
        collator: Makes a batch with `input_ids` and `labels` of rows.
        batch_size: Rows at a time.
        on_progress: Called after each batch with the rows done and their number.

    Raises:
        DataError: No row has a supervised token.
    """
    losses: list[float] = []
    counts: list[int] = []
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(dataset), batch_size):
            rows = [dataset[index] for index in range(start, min(start + batch_size, len(dataset)))]
            sums, supervised = row_losses(model, collator(rows))
            losses += sums
            counts += supervised
            if on_progress is not None:
                on_progress(start + len(rows), len(dataset))
    num_tokens = sum(counts)
    if num_tokens == 0:
        raise DataError("the held-out rows have no supervised token", found=f"{len(dataset)} rows, all masked")
    return ValidationLoss(sum(losses) / num_tokens, num_tokens, losses, counts)
