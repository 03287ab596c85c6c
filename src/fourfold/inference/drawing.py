"""From the logits of a pass to a token of each of its rows."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from typing import TypeAlias

import torch
from torch import Tensor

from fourfold.inference.logprobs import ArrivingLogprobs, TokenLogprob
from fourfold.inference.requests import Request, Sequence
from fourfold.inference.sampling import RowSampling, sample
from fourfold.inference.transfers import Arriving, to_device

__all__ = ["Draw", "Drawing", "Drawn"]

Drawn: TypeAlias = tuple[int, TokenLogprob | None]
"""A token, -1 where none can be chosen, and what was asked for of its probability."""


class Draw:
    """A token of each row, on its way from the device.

    Args:
        tokens: int64 [rows].
        logprobs: What was asked for of their probabilities.
    """

    def __init__(self, tokens: Tensor, logprobs: ArrivingLogprobs) -> None:
        self._tokens, self._logprobs = Arriving(tokens), logprobs

    def read(self) -> list[Drawn]:
        """The tokens, when they are there."""
        tokens = self._tokens.wait()[0].tolist()
        return list(zip(tokens, self._logprobs.read(tokens), strict=True))


class Drawing:
    """Samples as each sequence asks for, and knows the tokens of those whose repetitions cost: all so far for the
    repetition penalty, and for those of frequency and presence how often each was drawn.

    Attributes:
        last: int64 [num_slots], what was drawn last for each slot, on the device; 0 where no token could be chosen.

    Args:
        num_slots: Slots of the cache.
        vocab_size: Columns of the logits.
        device: Where they are.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._shape, self._device = (num_slots, vocab_size), device
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._rows: tuple[tuple[int, ...], RowSampling] | None = None
        self.last = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def begin(self, slot: int, request: Request) -> None:
        """Forget the tokens of the slot's last sequence; this one begins with its prompt."""
        if request.sampling.repetition_penalty != 1:
            if self._seen is None:
                self._seen = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._seen[slot] = False
            self._seen[slot, to_device(request.prompt_ids, torch.int64, self._device)] = True
        if request.sampling.counts_tokens:
            if self._counts is None:
                self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
            self._counts[slot] = 0

    def draw(
        self, sequences: Rows[Sequence], slots: Tensor, logits: Tensor, positions: Tensor, allowed: Tensor | None
    ) -> Draw:
        """Sample a token for each row. Nothing is waited for.

        Args:
            sequences: Of the rows.
            slots: int64 [n], theirs.
            logits: [n, vocab].
            positions: int64 [n], where the tokens will stand.
            allowed: bool [n, vocab], or None for all.
        """
        rows = self._sampling_of(sequences)
        seen = self._seen if rows.has_penalty else None
        counts = self._counts if rows.has_counts else None
        tokens = sample(logits, rows, positions, _of(seen, slots), allowed, _of(counts, slots))
        drawn = Draw(tokens, ArrivingLogprobs(logits, tokens, [one.request.logprobs for one in sequences]))
        # Last, so that a draw that fails can be repeated.
        chosen = tokens.clamp(min=0)
        self.last.index_copy_(0, slots, chosen)
        if seen is not None:
            seen[slots, chosen] = True
        if counts is not None:
            counts[slots, chosen] += 1
        return drawn

    def _sampling_of(self, sequences: Rows[Sequence]) -> RowSampling:
        """That of these rows; made anew only where they are others than in the step before."""
        key = tuple(sequence.number for sequence in sequences)
        if self._rows is None or self._rows[0] != key:
            options = [sequence.request.sampling for sequence in sequences]
            self._rows = (key, RowSampling.of(options, self._device))
        return self._rows[1]


def _of(known: Tensor | None, slots: Tensor) -> Tensor | None:
    return None if known is None else known[slots]
