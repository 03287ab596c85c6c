"""Log-probabilities of generated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TokenLogprob", "token_logprobs"]


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


def token_logprobs(logits: Tensor, tokens: Sequence[int], wanted: Sequence[int | None]) -> list[TokenLogprob | None]:
    """Those of the rows that ask for them.

    Args:
        logits: [rows, vocab].
        tokens: The token that was chosen in each row; -1 for none.
        wanted: How many of the likeliest each row asks for; None for nothing at all.
    """
    told: list[TokenLogprob | None] = [None] * len(tokens)
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return told
    scores = logits[rows].float().log_softmax(dim=1)
    chosen = torch.tensor([max(tokens[row], 0) for row in rows], device=logits.device)
    own = scores.gather(1, chosen[:, None])[:, 0].tolist()
    most = scores.topk(max(count or 0 for count in wanted), dim=1)
    values, indices = most.values.tolist(), most.indices.tolist()
    for place, row in enumerate(rows):
        count = wanted[row]
        top = tuple(zip(indices[place][:count], values[place][:count], strict=True))
        told[row] = TokenLogprob(tokens[row], own[place], top)
    return told
