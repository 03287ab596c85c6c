"""An answer in the words of the endpoint that gives it: whole, or piece by piece."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from fourfold.inference.requests import Chunk, TokenLogprob
from fourfold.serving.constraints import Grammars
from fourfold.serving.responses import chat_logprobs, completion_logprobs

__all__ = ["Body", "ChatBody", "CompletionBody", "Piece", "merged"]


@dataclass
class Piece:
    """What came of one choice since the last time, or all of it.

    Args:
        text: Text.
        logprobs: Of its tokens, where asked for.
        finish_reason: Why it ended; None while it goes on.
        num_tokens: Tokens of it, a stop token included.
    """

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int = 0

    def add(self, chunk: Chunk) -> None:
        self.text += chunk.text
        self.logprobs += chunk.logprobs or ()
        self.finish_reason = chunk.finish_reason or self.finish_reason
        self.num_tokens += len(chunk.token_ids)


def merged(chunks: list[tuple[int, Chunk]]) -> dict[int, Piece]:
    """By choice, in the order of their first chunks."""
    pieces: dict[int, Piece] = {}
    for index, chunk in chunks:
        pieces.setdefault(index, Piece()).add(chunk)
    return pieces


class Body(Protocol):
    """The form of an endpoint's answers."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a choice's stream begins with."""

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        """An event of a stream."""

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The event that ends a stream with the number of its tokens."""

    def whole(self, pieces: list[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer that is not streamed."""


class _Head:
    """What both have at their head, the same in each event."""

    def __init__(self, prefix: str, model: str, grammars: Grammars, has_logprobs: bool, with_usage: bool) -> None:
        self._head = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._grammars = grammars
        self._has_logprobs = has_logprobs
        # A stream that ends with its usage says in each event before that there is none yet.
        self._no_usage: dict[str, Any] = {"usage": None} if with_usage else {}


class ChatBody(_Head):
    """`/v1/chat/completions`."""

    def opening(self, index: int) -> dict[str, Any]:
        return self._event(index, {"role": "assistant", "content": ""}, None, None)

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return self._event(index, delta, self._logprobs(piece), piece.finish_reason)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}

    def whole(self, pieces: list[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
            }
            for index, piece in enumerate(pieces)
        ]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage}

    def _event(self, index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **self._no_usage}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        return chat_logprobs(piece.logprobs, self._grammars) if self._has_logprobs else None


class CompletionBody(_Head):
    """`/v1/completions`, with a count of each choice's characters for `text_offset`."""

    def __init__(self, prefix: str, model: str, grammars: Grammars, has_logprobs: bool, with_usage: bool) -> None:
        super().__init__(prefix, model, grammars, has_logprobs, with_usage)
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, piece: Piece) -> dict[str, Any]:
        return {**self._head, "object": "text_completion", "choices": [self._choice(index, piece)], **self._no_usage}

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": "text_completion", "choices": [], "usage": usage}

    def whole(self, pieces: list[Piece], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [self._choice(index, piece) for index, piece in enumerate(pieces)]
        return {**self._head, "object": "text_completion", "choices": choices, "usage": usage}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = None
        if self._has_logprobs:
            logprobs = completion_logprobs(piece.logprobs, self._grammars, self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
