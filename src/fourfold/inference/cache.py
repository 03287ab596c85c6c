"""Keys and values of many sequences at a time: a slot for each.

A slot is a row of every layer's tensors. All slots have one length, which grows by doubling as the longest sequence
does, so that short chats cost little; what is in a slot stays there. A layer with a sliding window is stored at full
length as well: any slot can then be taken up again from any of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.errors import InferenceError

__all__ = ["CacheShape", "LayerShape", "SlotCache", "bucket"]

FIRST_BUCKET = 512


@dataclass(frozen=True)
class LayerShape:
    """What one layer keeps of a token.

    Args:
        kv_heads: Heads of keys and values.
        key_dim, value_dim: Elements of a head.
        window: Tokens that the layer looks at, itself included; None for all.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True)
class CacheShape:
    """What a model keeps of a token.

    Args:
        layers: One for each layer of the model; None for a layer that keeps nothing of its own.
        dtype: That of keys and values.
    """

    layers: tuple[LayerShape | None, ...]
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        elements = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers if layer)
        return elements * self.dtype.itemsize

    @property
    def layer_token_bytes(self) -> int:
        """Bytes of one token in the layer that keeps the most."""
        sizes = [layer.kv_heads * (layer.key_dim + layer.value_dim) for layer in self.layers if layer]
        return max(sizes, default=0) * self.dtype.itemsize

    def num_bytes(self, num_slots: int, length: int) -> int:
        """Bytes of a cache of so many slots of so many tokens."""
        return num_slots * length * self.token_bytes

    def growing_bytes(self, num_slots: int, length: int) -> int:
        """Bytes that growing to this length takes for a moment beside the cache: half as much of its largest layer."""
        return num_slots * (length // 2) * self.layer_token_bytes

    @property
    def has_windows(self) -> bool:
        return any(layer is not None and layer.window is not None for layer in self.layers)


def bucket(length: int, max_length: int, first: int = FIRST_BUCKET) -> int:
    """The length that a cache is given to hold `length` tokens: `first`, doubled as often as needed, or all."""
    size = first
    while size < length:
        size *= 2
    return min(size, max_length)


class SlotCache:
    """Keys and values of up to `num_slots` sequences.

    Attributes:
        keys, values: One of each layer: [num_slots, kv_heads, length, key_dim or value_dim]; None for a layer that
            keeps nothing. Zero where nothing was written yet.
        length: Tokens that a slot has room for now.
        max_length: What it can grow to.
        version: Grows by one whenever the tensors are new ones.

    Args:
        shape: What a model keeps of a token.
        num_slots: Sequences at a time.
        max_length: Tokens of the longest one.
        device: Where.
        first_bucket: Length to begin with.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_slots: int,
        max_length: int,
        device: torch.device | str = "cpu",
        first_bucket: int = FIRST_BUCKET,
    ) -> None:
        self.shape = shape
        self.num_slots = num_slots
        self.max_length = max_length
        self.first_bucket = first_bucket
        self.device = torch.device(device)
        self.length = bucket(1, max_length, first_bucket)
        self.version = 0
        self.keys: list[Tensor | None] = []
        self.values: list[Tensor | None] = []
        for layer in shape.layers:
            self.keys.append(None if layer is None else self._empty(layer.kv_heads, self.length, layer.key_dim))
            self.values.append(None if layer is None else self._empty(layer.kv_heads, self.length, layer.value_dim))

    @property
    def num_bytes(self) -> int:
        """Bytes it takes now."""
        return self.shape.num_bytes(self.num_slots, self.length)

    def ensure(self, length: int) -> None:
        """Have room for sequences of `length` tokens, one layer after the other; what is in the slots stays.

        Raises:
            InferenceError: More than `max_length`.
            torch.OutOfMemoryError: No room; what stands in the slots is whole, and a later call goes on from there.
        """
        if length > self.max_length:
            raise InferenceError("a sequence longer than its cache", found=length, allowed=f"up to {self.max_length}")
        if length <= self.length:
            return
        size = bucket(length, self.max_length, self.first_bucket)
        for held in (self.keys, self.values):
            for index, old in enumerate(held):
                if old is None or old.shape[2] == size:
                    continue
                held[index] = new = self._empty(old.shape[1], size, old.shape[3])
                new[:, :, : old.shape[2]] = old
                self.version += 1
        self.length = size

    def _empty(self, heads: int, length: int, width: int) -> Tensor:
        # Zeros: what is masked counts nothing, but nothing times NaN is NaN.
        return torch.zeros(self.num_slots, heads, length, width, dtype=self.shape.dtype, device=self.device)
