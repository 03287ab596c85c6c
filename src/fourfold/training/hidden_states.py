"""What the LM head takes, of a call of the whole model that leaves the head to others."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fourfold.data import model_inputs
from fourfold.training.batches import boundary_mask, looks_back_only

__all__ = ["last_hidden_states", "takes_logits_to_keep"]


def takes_logits_to_keep(base: PreTrainedModel) -> bool:
    """Whether a call can leave out the logits of all positions but the last."""
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def last_hidden_states(
    model: nn.Module, base: PreTrainedModel, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of all positions, [batch, seq, hidden], and the logits of the last, [batch, 1, vocab].

    Args:
        model: What is called, so that DDP and autocast see the call: the model, with its adapter or without, or what
            wraps it.
        base: The causal LM in it.
        batch: Of `fourfold.data.Collator`, on the model's device.
    """
    captured: list[torch.Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        captured.append(output[0])

    inputs = model_inputs(base, batch)
    if batch.get("supervised_positions") is not None and base.training and looks_back_only(base.config):
        # Our collator pads on the right, where no real token looks: its mask would change nothing, and cost the
        # building and applying of [batch, 1, seq, seq].
        inputs["attention_mask"] = boundary_mask(batch, base.config)
    # The LM head of the model gets the last position only, and a forward hook hands out the hidden states of all.
    handle = base.base_model.register_forward_hook(keep)
    try:
        outputs = model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    (hidden_states,) = captured
    return hidden_states, outputs.logits
