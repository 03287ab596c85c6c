"""Perplexity of a model on a text, by sliding windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from fourfold.data import IGNORE_INDEX
from fourfold.errors import ConfigError, DataError
from fourfold.evaluation.token_loss import row_losses
from fourfold.inference import eval_mode

__all__ = ["Perplexity", "perplexity"]

Progress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of a text.

    Attributes:
        value: exp(loss).
        loss: Mean negative log likelihood of a token, in nats.
        num_tokens: Tokens scored: all but the first, before which nothing stands.
        window_losses: Summed loss of what each window scores, in nats.
        window_tokens: Tokens that each window scores.
    """

    value: float
    loss: float
    num_tokens: int
    window_losses: list[float] = field(default_factory=list, repr=False)
    window_tokens: list[int] = field(default_factory=list, repr=False)


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    max_length: int = 1024,
    stride: int = 512,
    batch_size: int = 1,
    max_tokens: int | None = None,
    on_progress: Progress | None = None,
) -> Perplexity:
    """exp of the mean negative log likelihood of a text's tokens, each scored once.

    A window of `max_length` tokens moves on by `stride`; each window scores the tokens that no window before
    it has scored, so that from the second window on a token has at least `max_length - stride` tokens before
    it. Figures of different windows or tokenizers do not compare.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        tokenizer: Its tokenizer.
        text: The text.
        max_length: Tokens in a window.
        stride: Tokens between the starts of two windows.
        batch_size: Windows at a time.
        max_tokens: Tokens of the text to take; all of them where None.
        on_progress: Called after each batch with the windows done and their number.

    Raises:
        ConfigError: A value that is not allowed.
        DataError: A text of fewer than two tokens.
    """
    if max_length < 2:
        raise ConfigError("key max_length", found=max_length, allowed="at least 2")
    # With the label of a window's first token lost to the shift, a stride of max_length would leave tokens
    # unscored.
    if not 1 <= stride < max_length:
        raise ConfigError("key stride", found=stride, allowed=f"1 to max_length - 1 = {max_length - 1}")
    if batch_size < 1:
        raise ConfigError("key batch_size", found=batch_size, allowed="at least 1")
    ids = torch.tensor(tokenizer(text)["input_ids"][:max_tokens])
    if len(ids) < 2:
        raise DataError("the text is too short for a perplexity", found=f"{len(ids)} tokens", allowed="2 or more")
    windows = list(_windows(len(ids), max_length, stride))
    losses: list[float] = []
    counts: list[int] = []
    with eval_mode(model), torch.no_grad():
        for group in _batches(windows, batch_size):
            input_ids = torch.stack([ids[start:stop] for start, stop, _ in group])
            labels = input_ids.clone()
            for row, (start, _, first) in enumerate(group):
                labels[row, : first - start] = IGNORE_INDEX
            sums, scored = row_losses(model, {"input_ids": input_ids, "labels": labels})
            losses += sums
            counts += scored
            if on_progress is not None:
                on_progress(len(losses), len(windows))
    loss = sum(losses) / sum(counts)
    return Perplexity(math.exp(loss), loss, sum(counts), losses, counts)


Window = tuple[int, int, int]
"""Start, stop, and the first token that is scored."""


def _windows(num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    first = 1
    for start in range(0, num_tokens, stride):
        stop = min(start + max_length, num_tokens)
        yield start, stop, first
        if stop == num_tokens:
            return
        first = stop


def _batches(windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of one length and one number of scored tokens together, so that nothing is padded."""
    group: list[Window] = []
    for window in windows:
        if group and (len(group) == batch_size or _shape(window) != _shape(group[0])):
            yield group
            group = []
        group.append(window)
    yield group


def _shape(window: Window) -> tuple[int, int]:
    start, stop, first = window
    return stop - start, first - start
