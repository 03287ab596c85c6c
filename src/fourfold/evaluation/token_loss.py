"""The exact cross entropy of a batch: logits only where a label is, summed in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from fourfold.data import IGNORE_INDEX, model_inputs

__all__ = ["row_losses"]


def row_losses(model: Any, batch: Mapping[str, Any]) -> tuple[list[float], list[int]]:
    """Summed cross entropy of the labels of each row of a batch, and how many labels each has.

    The output layer runs only on positions of the sequence that predict a label in some row of the batch,
    which is where its logits would fill the memory. The loss of each token is computed in float32 (float64
    for a float64 model), the sum in float64. The caller sees to evaluation mode.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one.
        batch: `input_ids` and `labels`, int64, [batch, seq], with whatever else the model takes; on any
            device.
    """
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in model_inputs(model, batch).items()
    }
    labels = batch["labels"].to(model.device)
    targets = labels[:, 1:]  # [batch, seq - 1]: position t predicts token t + 1
    predicting = (targets != IGNORE_INDEX).any(dim=0).nonzero().squeeze(1)  # [kept]
    if len(predicting) == 0:
        return [0.0] * len(labels), [0] * len(labels)
    # Without use_cache=False, Transformers takes a packed row for one document.
    logits = model(**inputs, logits_to_keep=predicting, use_cache=False).logits
    if logits.shape[1] != len(predicting):  # a model that does not know logits_to_keep
        logits = logits[:, predicting]
    targets = targets[:, predicting]
    supervised = targets != IGNORE_INDEX
    chosen = logits[supervised]  # [tokens, vocab]
    if chosen.dtype != torch.float64:
        chosen = chosen.float()
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    losses[supervised] = functional.cross_entropy(chosen, targets[supervised], reduction="none").double()
    sums: list[float] = losses.sum(dim=1).tolist()
    counts: list[int] = supervised.sum(dim=1).tolist()
    return sums, counts
