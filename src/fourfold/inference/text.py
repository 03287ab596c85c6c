"""From tokens to text, a piece at a time: no half characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerFast

__all__ = ["Detokenizer", "StopStrings"]

# What tokenizers write for bytes that are no character. One that is not whole yet has at most three such bytes.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_MOST_PENDING = 3


class Detokenizer:
    """Text of tokens that come one by one.

    What is decoded each time is not all of the text but a window: it begins with the tokens of the last piece, for many
    tokenizers write a token's text by what stands before it.

    Args:
        tokenizer: Of Transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = _decoder(tokenizer)
        self.window: list[int] = []
        self.num_given = 0  # tokens of the window, and characters of their text, that were given
        self.given = ""

    def add(self, token_id: int) -> str:
        """The text that this token makes certain."""
        self.window.append(token_id)
        text = self._decode(self.window)
        pending = min(len(text) - len(text.rstrip(_BROKEN)), _MOST_PENDING)
        piece = text[len(self.given) : len(text) - pending]
        # Nor is a window begun with tokens of no text: what follows would have nothing before it.
        if pending or not piece:
            self.given += piece
            return piece
        self.window = self.window[self.num_given :]
        self.num_given = len(self.window)
        self.given = self._decode(self.window)
        return piece

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._decode(self.window)[len(self.given) :]


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Text of tokens, without special ones. Transformers' own way there takes several times as long, for each token;
    where it would do nothing else, the tokenizer beneath is asked."""
    kind = type(tokenizer)
    is_plain = (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind._decode is PreTrainedTokenizerFast._decode
        and kind.decode is PreTrainedTokenizerFast.decode
        and not tokenizer.clean_up_tokenization_spaces
    )
    return partial(tokenizer.backend_tokenizer.decode if is_plain else tokenizer.decode, skip_special_tokens=True)


class StopStrings:
    """Finds where an answer ends by its text, and holds back what may be the beginning of that.

    Args:
        stop: The texts; none lets everything through.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """The text that is certainly no part of a stop string, and whether one was found behind it."""
        text = self.held + text
        found = [place for place in (text.find(stop) for stop in self.stop) if place >= 0]
        if found:
            self.held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def end(self) -> str:
        """What was held back."""
        held, self.held = self.held, ""
        return held

    def whole(self, text: str) -> str:
        """All of a text that stands before the first stop string."""
        before, _ = self.add(text)
        return before + self.end()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a beginning of the stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
