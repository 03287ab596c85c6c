"""A model with or without an adapter, as one thing."""

from __future__ import annotations

from peft import PeftModel
from transformers import PreTrainedModel

__all__ = ["underlying"]


def underlying(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The Transformers model: of a PEFT model its base, else the model itself."""
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    return base
