"""From the logits of a pass to a token of each of its rows."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from typing import TypeAlias

import torch
from torch import Tensor

from fourfold.inference.logprobs import TokenLogprob, token_logprobs
from fourfold.inference.requests import Sequence
from fourfold.inference.sampling import RowSampling, sample

__all__ = ["Drawing", "Drawn"]

Drawn: TypeAlias = tuple[int, TokenLogprob | None]
"""A token, -1 where none can be chosen, and what was asked for of its probability."""


class Drawing:
    """Samples as each sequence asks for, and knows the tokens of those whose repetitions cost.

    Args:
        num_slots: Slots of the cache.
        vocab_size: Columns of the logits.
        device: Where they are.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (num_slots, vocab_size), device
        self._seen: Tensor | None = None
        self._rows: tuple[tuple[int, ...], RowSampling] | None = None

    def see(self, slot: int, tokens: Iterable[int], anew: bool = False) -> None:
        """Remember tokens of a slot's sequence; with `anew`, it is another one than before."""
        if self._seen is None:
            self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        if anew:
            self._seen[slot] = False
        self._seen[slot, torch.tensor(list(tokens), device=self._device)] = True

    def draw(
        self, sequences: Rows[Sequence], slots: list[int], logits: Tensor, positions: Tensor, allowed: Tensor | None
    ) -> list[Drawn]:
        """Sample a token for each row.

        Args:
            sequences, slots: Of the rows.
            logits: [n, vocab].
            positions: int64 [n], where the tokens will stand.
            allowed: bool [n, vocab], or None for all.
        """
        rows = self._sampling_of(sequences)
        seen = self._seen[slots] if rows.has_penalty and self._seen is not None else None
        tokens = sample(logits, rows, positions, seen, allowed).tolist()
        wanted = [sequence.request.logprobs for sequence in sequences]
        return list(zip(tokens, token_logprobs(logits, tokens, wanted), strict=True))

    def _sampling_of(self, sequences: Rows[Sequence]) -> RowSampling:
        """That of these rows; made anew only where they are others than in the step before."""
        key = tuple(sequence.number for sequence in sequences)
        if self._rows is None or self._rows[0] != key:
            options = [sequence.request.sampling for sequence in sequences]
            self._rows = (key, RowSampling.of(options, self._device))
        return self._rows[1]
