"""The fastest step that a model has."""

from __future__ import annotations

import logging

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fourfold.inference.cache import SlotCache
from fourfold.inference.generic_step import GenericStep
from fourfold.inference.steps import Step
from fourfold.models.decoding import FusedStep
from fourfold.models.linear_group import Unsupported

__all__ = ["FusedOrGeneric", "step_for"]

logger = logging.getLogger(__name__)


def step_for(model: PreTrainedModel | PeftModel, *, fused: bool | None = None) -> Step:
    """What turns a model's tokens into logits.

    Args:
        model: A causal LM, in evaluation mode.
        fused: Whether the fused step is taken, where the model's family has one; None takes it on a GPU. On a CPU it
            is PyTorch's own operations in another order, and no faster.

    Raises:
        InferenceError: The engine cannot run this model.
    """
    generic = GenericStep(model)
    if fused is False or (fused is None and generic.base.device.type != "cuda"):
        return generic
    try:
        return FusedOrGeneric(FusedStep(model), generic)
    except Unsupported as reason:
        logger.info("Answers take the generic path, which is slower: %s", reason)
        return generic


class FusedOrGeneric:
    """The fused step for the adapters that it takes, the generic one for the others. See `Step`."""

    def __init__(self, fused: FusedStep, generic: GenericStep) -> None:
        self.fused = fused
        self.generic = generic
        self.shape = generic.shape
        self.vocab_size = fused.vocab_size
        self._chosen: dict[str | None, FusedStep | GenericStep] = {}

    def prefill(self, slot: int, input_ids: Tensor, cache: SlotCache, adapter: str | None, start: int = 0) -> Tensor:
        return self._step(adapter).prefill(slot, input_ids, cache, adapter, start)

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: SlotCache, adapter: str | None) -> Tensor:
        return self._step(adapter).decode(tokens, slots, positions, cache, adapter)

    def _step(self, adapter: str | None) -> FusedStep | GenericStep:
        if adapter not in self._chosen:
            reason = self.fused.supports(adapter)
            if reason is not None:
                logger.info("Answers of %s take the generic path, which is slower: %s", adapter or "the base", reason)
            self._chosen[adapter] = self.fused if reason is None else self.generic
        return self._chosen[adapter]
