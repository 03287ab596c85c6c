"""Any causal language model of Transformers as the step of an engine, by its public extension points.

Transformers' models ask a `Cache` for keys and values, layer by layer. Ours are views of an engine's slots. To the
model a pass of several slots looks like a batch of `generate`: padded, under an attention mask. Where each row's keys
stand as they are in the slots, the padding is on the right, and slots that lie side by side are read where they stand.
Models that count positions backwards from the end of the row, with sliding windows or by the mask, get their keys
gathered, padded on the left.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from fourfold.errors import InferenceError
from fourfold.inference.cache import CacheShape, LayerShape, SlotCache
from fourfold.models.underlying import underlying

__all__ = ["GenericStep", "cache_shape"]


def cache_shape(model: PreTrainedModel | PeftModel) -> CacheShape:
    """What a model keeps of a token, seen from one pass over one token.

    Raises:
        InferenceError: It keeps something else than keys and values of each token.
    """
    base = underlying(model)
    name = type(base).__name__

    def refuse(found: str) -> InferenceError:
        return InferenceError(
            f"{name} cannot be run by the engine",
            found=found,
            allowed="models whose layers keep keys and values of each token, and nothing else",
            hint="generate_replies and stream_reply run it, one conversation after the other",
        )

    if base.config.is_encoder_decoder:
        raise refuse("an encoder-decoder")
    if getattr(base, "_is_stateful", False):
        raise refuse("a recurrent state")
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    token = torch.zeros(1, 1, dtype=torch.int64, device=base.device)
    argument = _cache_argument(base)
    with torch.no_grad():
        base(input_ids=token, use_cache=True, **{argument: cache})
    layers: list[LayerShape | None] = []
    for layer in cache.layers:
        if isinstance(layer, DummyLayer):
            layers.append(None)
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise refuse(f"layers of {type(layer).__name__}")
        layers.append(
            LayerShape(
                layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3], getattr(layer, "sliding_window", None)
            )
        )
        dtype = layer.keys.dtype
    if not any(layers):
        raise refuse("no keys and values in the cache")
    return CacheShape(tuple(layers), dtype)


class GenericStep:
    """A causal LM of Transformers, or a PEFT model around one. See `fourfold.inference.steps.Step`.

    Where a request's adapter is not the one that is in force, it is switched by PEFT's own functions.

    Args:
        model: The model, in evaluation mode.

    Raises:
        InferenceError: A model that cannot be run so.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        self.base = underlying(model)
        self.shape = cache_shape(model)
        self.vocab_size: int = self.base.config.get_text_config(decoder=True).vocab_size
        parameters = inspect.signature(self.base.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._argument = _cache_argument(self.base)
        # Rows as they stand, padded on the right, or gathered, padded on the left.
        self._gathers = self.shape.has_windows or not self._takes_positions
        self._view = _View(self.shape)

    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters there are."""
        return tuple(self.model.peft_config) if isinstance(self.model, PeftModel) else ()

    def use(self, adapter: str | None) -> None:
        """Put an adapter in force, or none.

        Raises:
            InferenceError: There is none of this name.
        """
        if adapter is not None and adapter not in self.adapters():
            raise InferenceError("unknown adapter", found=adapter, allowed=self.adapters() or "none: this is a base")
        if not isinstance(self.model, PeftModel):
            return
        layers = self.model.base_model
        if adapter is None:
            if not self._is_off():
                layers.disable_adapter_layers()
            return
        if self._is_off():
            layers.enable_adapter_layers()
        if self.model.active_adapters != [adapter]:
            self.model.set_adapter(adapter, inference_mode=True)

    def _is_off(self) -> bool:
        return self.model.get_model_status().enabled is False

    @torch.no_grad()
    def prefill(self, slot: int, input_ids: Tensor, cache: SlotCache, adapter: str | None, start: int = 0) -> Tensor:
        self.use(adapter)
        self._view.one(cache, slot, start)
        positions = torch.arange(start, start + len(input_ids), device=input_ids.device)
        return self._forward(input_ids[None], positions[None], None)[0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: SlotCache, adapter: str | None) -> Tensor:
        self.use(adapter)
        mask = self._view.many(cache, slots, positions, self._gathers)
        return self._forward(tokens[:, None], positions[:, None], mask)

    def _forward(self, input_ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        arguments: dict[str, Any] = {self._argument: self._view, "use_cache": True, **self._keeps_last}
        if self._takes_positions:
            arguments["position_ids"] = positions
        output = self.base(input_ids=input_ids, attention_mask=mask, **arguments)
        logits: Tensor = output.logits[:, -1]
        return logits


def _cache_argument(base: PreTrainedModel) -> str:
    """Transformers renamed it in 5.24."""
    parameters = inspect.signature(base.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class _View(Cache):
    """The slots of one pass, as Transformers' cache."""

    def __init__(self, shape: CacheShape) -> None:
        self.slot_layers = [_SlotLayer(index, layer.window) for index, layer in enumerate(shape.layers) if layer]
        slot_layers = iter(self.slot_layers)
        super().__init__(layers=[next(slot_layers) if layer else DummyLayer() for layer in shape.layers])

    def one(self, cache: SlotCache, slot: int, start: int) -> None:
        """Tokens of one slot from `start` on."""
        for layer in self.slot_layers:
            layer.open(cache, start)
            layer.slot = slot

    def many(self, cache: SlotCache, slots: Tensor, positions: Tensor, gathers: bool) -> Tensor:
        """A token of each slot. Returns the attention mask [n, span] of what each row may look at."""
        if cache.device.type == "cpu":
            span = int(positions.max()) + 1
            first = int(slots[0])
            lie_together = bool((slots == torch.arange(first, first + len(slots))).all())
            run = (first, len(slots)) if lie_together else None
        else:
            span, run = cache.length, None
        row = torch.arange(span, device=positions.device)
        for layer in self.slot_layers:
            layer.open(cache, span - 1)
            layer.slots, layer.positions, layer.run, layer.gathers = slots, positions, run, gathers
            # Then Transformers makes its masks without reading the one that they are made of.
            layer.is_compileable = True
        if gathers:
            return row >= span - 1 - positions[:, None]
        return row <= positions[:, None]


class _SlotLayer(CacheLayerMixin):
    """A layer's keys and values of the slots of one pass."""

    supports_early_init = False

    def __init__(self, index: int, window: int | None) -> None:
        super().__init__()
        self.index = index
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True
        self.is_compileable = False

    def open(self, cache: SlotCache, start: int) -> None:
        self.cache, self.start = cache, start
        self.slot: int | None = None
        self.is_compileable = False
        self.slots: Tensor | None = None
        self.positions: Tensor | None = None
        self.run: tuple[int, int] | None = None
        self.gathers = False

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[self.index], self.cache.values[self.index]
        assert keys is not None and values is not None
        if self.slot is not None:
            end = self.start + key_states.shape[2]
            keys[self.slot, :, self.start : end] = key_states[0]
            values[self.slot, :, self.start : end] = value_states[0]
            _, first = self.get_mask_sizes(key_states.shape[2])
            rows = slice(self.slot, self.slot + 1)
            return keys[rows, :, first:end], values[rows, :, first:end]
        slots, positions, span = self.slots, self.positions, self.start + 1
        assert slots is not None and positions is not None
        keys[slots, :, positions] = key_states[:, :, 0]
        values[slots, :, positions] = value_states[:, :, 0]
        if self.gathers:
            width, _ = self.get_mask_sizes(1)
            places = (positions[:, None] - (width - 1) + torch.arange(width, device=positions.device)).clamp(min=0)
            rows = slots[:, None]
            return keys[rows, :, places].transpose(1, 2), values[rows, :, places].transpose(1, 2)
        if self.run is not None:
            first, count = self.run
            return keys[first : first + count, :, :span], values[first : first + count, :, :span]
        return keys[:, :, :span].index_select(0, slots), values[:, :, :span].index_select(0, slots)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a pass gives, and which is the first: of a sliding window what its first query may look at."""
        first = 0 if self.window is None else max(self.start - self.window + 1, 0)
        return self.start + query_length - first, first

    def get_seq_length(self) -> int:
        return self.start

    def get_max_length(self) -> int:
        return self.cache.max_length

    get_max_cache_shape = get_max_length  # its name before Transformers 5.20

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to do: the slots are there."""
