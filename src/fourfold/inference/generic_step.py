"""Any causal language model of Transformers as the step of an engine, by its public extension points.

Transformers' models ask a `Cache` for keys and values, layer by layer. Ours are views of an engine's slots. To the
model a pass of several slots looks like a batch of `generate`: padded, under an attention mask. Where each row's keys
stand as they are in the slots, the padding is on the right, and slots that lie side by side are read where they stand.
Models that count positions backwards from the end of the row, with sliding windows or by the mask, get their keys
gathered, padded on the left.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
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
    if isinstance(model, PeftModel) and any(config.is_prompt_learning for config in model.peft_config.values()):
        raise refuse("an adapter of virtual tokens")
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    token = torch.zeros(1, 1, dtype=torch.int64, device=base.device)
    argument = _cache_argument(base)
    try:
        with torch.no_grad():
            base(input_ids=token, use_cache=True, **{argument: cache})
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        # Models with a cache of their own say so in words of their own.
        raise refuse(f"{type(error).__name__} with an ordinary cache: {error}") from error
    layers: list[LayerShape | None] = []
    for layer in cache.layers:
        # Newer than the oldest Transformers there may be.
        if type(layer).__name__ == "DummyLayer":
            layers.append(None)
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.keys is None:
            raise refuse(f"a layer that keeps nothing, or something else ({type(layer).__name__})")
        if layer.keys.device != base.device:
            raise refuse(f"layers on {base.device} and {layer.keys.device}")
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

    Where a request's adapter is not the one that is in force, it is switched by PEFT's own functions; nobody else
    switches meanwhile.

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
        # Older models mask by themselves, too, and count from the row's end; all of those that leave masks to
        # Transformers say that they do.
        is_plain = self._takes_positions and getattr(self.base, "_supports_attention_backend", False)
        self._gathers = self.shape.has_windows or not is_plain
        self._view = _View(self.shape)
        # Asking PEFT walks through all modules: done once.
        self._in_force: list[str | None] = []
        if isinstance(model, PeftModel):
            self._in_force = model.active_adapters if model.get_model_status().enabled is True else [None]

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
        if not isinstance(self.model, PeftModel) or self._in_force == [adapter]:
            return
        layers = self.model.base_model
        if adapter is None:
            layers.disable_adapter_layers()
        else:
            layers.enable_adapter_layers()
            self.model.set_adapter(adapter, inference_mode=True)
        self._in_force = [adapter]

    def captured_bytes(self, _length: int) -> int:
        """None of its prompts is captured."""
        return 0

    @torch.no_grad()
    def prefill(self, slot: int, input_ids: Tensor, cache: SlotCache, adapter: str | None, start: int = 0) -> Tensor:
        self.use(adapter)
        self._view.now = _OneSlot(cache, slot, start)
        positions = torch.arange(start, start + len(input_ids), device=input_ids.device)
        return self._forward(input_ids[None], positions[None], None)[0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: SlotCache, adapter: str | None) -> Tensor:
        self.use(adapter)
        on_cpu = cache.device.type == "cpu"
        if on_cpu and len(slots) == 1:
            # As generate has it: no mask, so the same kernels and the same numbers.
            self._view.now = _OneSlot(cache, int(slots), int(positions))
            return self._forward(tokens[:, None], positions[:, None], None)
        start, run = cache.length - 1, None
        if on_cpu:
            start, first = int(positions.max()), int(slots[0])
            if torch.equal(slots, torch.arange(first, first + len(slots))):
                run = (first, first + len(slots))
        self._view.now = now = _ManySlots(cache, slots, positions, start, run, self._gathers)
        return self._forward(tokens[:, None], positions[:, None], now.mask())

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


@dataclass(frozen=True)
class _OneSlot:
    """A pass over tokens of one slot, from `start` on.

    Attributes:
        start: Keys before the pass, as its queries count them.
    """

    cache: SlotCache
    slot: int
    start: int

    def write(self, index: int, keys: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [1, kv_heads, tokens, dim]; gives those from the first one on."""
        end = self.start + keys.shape[2]
        given = []
        for held, new in ((self.cache.keys[index], keys), (self.cache.values[index], values)):
            assert held is not None
            held[self.slot, :, self.start : end] = new[0]
            given.append(held[self.slot : self.slot + 1, :, first:end])
        return given[0], given[1]


@dataclass(frozen=True)
class _ManySlots:
    """A pass over one token of each of some slots.

    Attributes:
        start: Keys before the pass, as its queries count them.
        run: The slots where they lie side by side: the first and the one behind the last.
        gathers: Whether rows end together, padded on the left; else they begin together, padded on the right.
    """

    cache: SlotCache
    slots: Tensor
    positions: Tensor
    start: int
    run: tuple[int, int] | None
    gathers: bool

    def mask(self) -> Tensor:
        """Which keys a row may look at: bool [n, start + 1]."""
        column = torch.arange(self.start + 1, device=self.positions.device)
        if self.gathers:
            return column >= self.start - self.positions[:, None]
        return column <= self.positions[:, None]

    def write(self, index: int, keys: Tensor, values: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values [n, kv_heads, 1, dim]; gives those from the first one on."""
        given = []
        for held, new in ((self.cache.keys[index], keys), (self.cache.values[index], values)):
            assert held is not None
            held[self.slots, :, self.positions] = new[:, :, 0]
            given.append(self._read(held, first))
        return given[0], given[1]

    def _read(self, held: Tensor, first: int) -> Tensor:
        if self.gathers:
            column = torch.arange(first, self.start + 1, device=held.device)
            places = (column - (self.start - self.positions[:, None])).clamp(min=0)
            return held[self.slots[:, None], :, places].transpose(1, 2)
        if self.run is not None:
            return held[self.run[0] : self.run[1], :, : self.start + 1]
        return held[:, :, : self.start + 1].index_select(0, self.slots)


class _View(Cache):
    """The slots of the pass at hand, as Transformers' cache."""

    now: _OneSlot | _ManySlots

    def __init__(self, shape: CacheShape) -> None:
        layers = [
            cache_utils.DummyLayer() if layer is None else _SlotLayer(self, index, layer.window)
            for index, layer in enumerate(shape.layers)
        ]
        super().__init__(layers=layers)


class _SlotLayer(CacheLayerMixin):
    """A layer of it."""

    supports_early_init = False

    def __init__(self, view: _View, index: int, window: int | None) -> None:
        super().__init__()
        self.view = view
        self.index = index
        self.window = window
        self.is_sliding = window is not None
        self.is_initialized = True

    @property
    def is_compileable(self) -> bool:
        """Where it is, Transformers makes its masks without reading the one that they are made of."""
        return isinstance(self.view.now, _ManySlots)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _, first = self.get_mask_sizes(key_states.shape[2])
        return self.view.now.write(self.index, key_states, value_states, first)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a pass gives, and which is the first: of a window, what the first query may look at."""
        start = self.view.now.start
        first = 0 if self.window is None else max(start - self.window + 1, 0)
        return start + query_length - first, first

    def get_seq_length(self) -> int:
        return self.view.now.start

    def get_max_length(self) -> int:
        return self.view.now.cache.max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to do: the slots are there."""
