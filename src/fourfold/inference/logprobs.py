"""Log-probabilities of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.inference.transfers import Arriving, to_device

__all__ = ["ArrivingLogprobs", "TokenLogprob"]


@dataclass(frozen=True)
class TokenLogprob:
    """Of one generated token, under the model's own distribution: before temperature, filters and constraints.

    Args:
        token_id: The token.
        logprob: Its natural log-probability.
        top: The likeliest tokens and theirs, the likeliest first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class ArrivingLogprobs:
    """Those of the rows that ask for them, on their way to the host.

    Args:
        logits: [rows, vocab].
        tokens: int64 [rows], the token that was chosen in each; -1 for none.
        wanted: How many of the likeliest each row asks for; None for nothing at all.
    """

    def __init__(self, logits: Tensor, tokens: Tensor, wanted: Sequence[int | None]) -> None:
        self._wanted = wanted
        self._rows = [row for row, count in enumerate(wanted) if count is not None]
        self._arriving = Arriving()
        if self._rows:
            rows = to_device(self._rows, torch.int64, logits.device)
            scores = logits[rows].float().log_softmax(dim=1)
            own = scores.gather(1, tokens[rows].clamp(min=0)[:, None])[:, 0]
            most = scores.topk(max(count or 0 for count in wanted), dim=1)
            self._arriving = Arriving(own, most.values, most.indices)

    def read(self, tokens: Sequence[int]) -> list[TokenLogprob | None]:
        """Of each row, given its token."""
        told: list[TokenLogprob | None] = [None] * len(self._wanted)
        arrived = [tensor.tolist() for tensor in self._arriving.wait()]
        for place, row in enumerate(self._rows):
            own, values, indices = (each[place] for each in arrived)
            count = self._wanted[row]
            told[row] = TokenLogprob(tokens[row], own, tuple(zip(indices[:count], values[:count], strict=True)))
        return told
