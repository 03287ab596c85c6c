"""A model with or without an adapter, as one thing."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

__all__ = ["decoder_layers", "underlying"]


def underlying(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The Transformers model: of a PEFT model its base, else the model itself."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def decoder_layers(base: nn.Module) -> nn.ModuleList | None:
    """The stack of a model's decoder layers; None where none has as many layers as its configuration says."""
    config: Any = getattr(base, "config", None)
    num_layers = config.get_text_config().num_hidden_layers if config is not None else 0
    stacks = (module for module in base.modules() if isinstance(module, nn.ModuleList))
    return next((stack for stack in stacks if len(stack) == num_layers), None)
