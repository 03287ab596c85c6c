"""How likely a model takes a continuation of a text to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fourfold.data import model_inputs
from fourfold.errors import ConfigError, DataError
from fourfold.inference import eval_mode

__all__ = ["Continuation", "Likelihood", "continuation_likelihoods", "longest_input"]

Continuation: TypeAlias = tuple[list[int], list[int]]
"""Token ids of what stands before, and of what is scored."""


@dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        log_prob: Sum of its tokens' log-probabilities, in nats.
        num_tokens: Its tokens.
        is_greedy: Whether each of them is the likeliest at its place.
    """

    log_prob: float
    num_tokens: int
    is_greedy: bool


def longest_input(model: Any, default: int = 2048) -> int:
    """Tokens that the model has positions for, by its configuration."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else default


def continuation_likelihoods(
    model: Any,
    continuations: Sequence[Continuation],
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """Score each continuation after what stands before it, in the order given.

    Continuations of like length share a batch, padded on the right. Log-probabilities are computed in fp32 and summed
    in fp64. What is longer than the model's positions loses its beginning.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        continuations: Token ids; at least one before, and at least one to be scored.
        batch_size: Continuations at a time.
        on_progress: Called after each batch with the continuations done and their number.

    Raises:
        ConfigError: A batch of none.
        DataError: Nothing before a continuation, nothing to score, or more than the model has positions for.
    """
    if batch_size < 1:
        raise ConfigError("key batch_size", found=batch_size, allowed="at least 1")
    longest = longest_input(model)
    for number, (before, scored) in enumerate(continuations, start=1):
        if not before or not scored or len(scored) > longest:
            raise DataError(
                f"continuation {number} cannot be scored",
                found=f"{len(before)} tokens before it, {len(scored)} of its own",
                allowed=f"at least one before it, 1 to {longest} of its own",
            )
    order = sorted(range(len(continuations)), key=lambda index: -sum(map(len, continuations[index])))
    found: dict[int, Likelihood] = {}
    with eval_mode(model), torch.no_grad():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [continuations[index] for index in chosen]
            found |= zip(chosen, _likelihoods(model, batch, longest), strict=True)
            if on_progress is not None:
                on_progress(len(found), len(order))
    return [found[index] for index in range(len(order))]


def _likelihoods(model: Any, batch: Sequence[Continuation], longest: int) -> list[Likelihood]:
    # The last token predicts nothing that is scored.
    rows = [(before + scored)[-(longest + 1) :] for before, scored in batch]
    width = max(map(len, rows)) - 1
    padded = torch.tensor([[*row[:-1], *[0] * (width + 1 - len(row))] for row in rows])  # [batch, width]
    mask = torch.tensor([[1] * (len(row) - 1) + [0] * (width + 1 - len(row)) for row in rows])
    first = min(len(row) - 1 - len(scored) for row, (_, scored) in zip(rows, batch, strict=True))
    keep = torch.arange(first, width, device=model.device)
    inputs = model_inputs(model, {"input_ids": padded, "attention_mask": mask})
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits
    if logits.shape[1] != len(keep):  # a model that does not know logits_to_keep
        logits = logits[:, first:]
    result = []
    for index, (row, (_, scored)) in enumerate(zip(rows, batch, strict=True)):
        start = len(row) - 1 - len(scored) - first
        own = logits[index, start : start + len(scored)]  # [scored, vocab]
        ids = torch.tensor(scored, device=own.device)
        log_probs = own.float().log_softmax(-1).gather(1, ids[:, None])
        is_greedy = bool((own.argmax(-1) == ids).all())
        result.append(Likelihood(float(log_probs.double().sum()), len(scored), is_greedy))
    return result
