"""What turns tokens into logits: the step of an engine."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fourfold.inference.cache import CacheShape, SlotCache

__all__ = ["Step"]


class Step(Protocol):
    """A model that reads and writes slots of a cache. All tensors are on its device.

    Attributes:
        shape: What it keeps of a token.
        vocab_size: Columns of its logits.
    """

    shape: CacheShape
    vocab_size: int

    def captured_bytes(self, length: int) -> int:
        """What it keeps at most for passes over prompts that are CUDA graphs, where slots have so many tokens."""
        ...

    def prefill(self, slot: int, input_ids: Tensor, cache: SlotCache, adapter: str | None, start: int = 0) -> Tensor:
        """Write a part of a prompt into a slot.

        Args:
            slot: Which.
            input_ids: int64 [length], the sequence's tokens from `start` on; those before stand in the slot.
            cache: Has room for `start + length` tokens.
            adapter: Name of the adapter; None for the base.
            start: Tokens that stand in the slot.

        Returns:
            Logits [vocab] after the last token.
        """
        ...

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: SlotCache, adapter: str | None) -> Tensor:
        """Write a token to each of these slots.

        Args:
            tokens: int64 [n].
            slots: int64 [n], all different.
            positions: int64 [n], the tokens that each slot holds: where its token is written.
            cache: Has room for them.
            adapter: Name of the adapter of all rows; None for the base.

        Returns:
            Logits [n, vocab]. On a GPU nothing is read back, so that it can be captured in a CUDA graph.
        """
        ...
