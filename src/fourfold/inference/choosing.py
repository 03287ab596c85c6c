"""The fastest step that a model has."""

from __future__ import annotations

import logging

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fourfold.inference.cache import SlotCache
from fourfold.inference.decode_graphs import GraphedStep
from fourfold.inference.generic_step import GenericStep
from fourfold.models.decoding import FusedStep
from fourfold.models.linear_group import Unsupported
from fourfold.quantization.linear import QuantizedWeight

__all__ = ["ChosenStep", "step_for"]

logger = logging.getLogger(__name__)


def step_for(model: PreTrainedModel | PeftModel, *, fused: bool | None = None) -> ChosenStep:
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
        return ChosenStep(generic)
    try:
        return ChosenStep(generic, FusedStep(model))
    except Unsupported as reason:
        logger.info("Answers take the generic path, which is slower: %s", reason)
        return ChosenStep(generic)


class ChosenStep:
    """The fused step for the adapters that it takes, the generic one for the others. See `Step`.

    Passes are replayed as CUDA graphs on a GPU, where they can be captured: those of the fused step, and decode passes
    of models of which Transformers says that their forward pass is one graph.

    Args:
        generic: Takes everything.
        fused: Is asked first.
    """

    def __init__(self, generic: GenericStep, fused: FusedStep | None = None) -> None:
        self.generic = generic
        self.fused = fused
        self.shape = generic.shape
        self.vocab_size = generic.vocab_size if fused is None else fused.vocab_size
        self._chosen: dict[str | None, FusedStep | GenericStep] = {}
        graphed: list[FusedStep | GenericStep] = [] if fused is None else [fused]
        if _is_one_graph(generic):
            graphed.append(generic)
        self._graphs: dict[FusedStep | GenericStep, GraphedStep] = {step: GraphedStep(step) for step in graphed}

    def captured_bytes(self, length: int) -> int:
        fused = self.fused
        if fused is None or fused not in self._graphs or self.generic.base.device.type != "cuda":
            return 0
        return self._graphs[fused].captured_bytes(length)

    def prefill(self, slot: int, input_ids: Tensor, cache: SlotCache, adapter: str | None, start: int = 0) -> Tensor:
        step = self._step(adapter)
        return self._graphs.get(step, step).prefill(slot, input_ids, cache, adapter, start)

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: SlotCache, adapter: str | None) -> Tensor:
        step = self._step(adapter)
        if step in self._graphs:
            try:
                return self._graphs[step].decode(tokens, slots, positions, cache, adapter)
            except RuntimeError as error:
                if not tokens.is_cuda:
                    raise
                # What is wrong with the pass itself shows below.
                logger.warning("Decode passes are not captured as CUDA graphs, which is slower: %s", error)
                del self._graphs[step]
        return step.decode(tokens, slots, positions, cache, adapter)

    def _step(self, adapter: str | None) -> FusedStep | GenericStep:
        if self.fused is None:
            return self.generic
        if adapter not in self._chosen:
            reason = self.fused.supports(adapter)
            if reason is not None:
                logger.info("Answers of %s take the generic path, which is slower: %s", adapter or "the base", reason)
            self._chosen[adapter] = self.fused if reason is None else self.generic
        return self._chosen[adapter]


def _is_one_graph(step: GenericStep) -> bool:
    streams = any(isinstance(module, QuantizedWeight) and module.streamed is not None for module in step.base.modules())
    return getattr(step.base, "_can_compile_fullgraph", False) and not streams
