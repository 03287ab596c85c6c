"""Replies of a model: batched for evaluation, streamed for a chat."""

from __future__ import annotations

from fourfold.inference.generate import (
    GenerationOptions,
    Message,
    eval_mode,
    generate_replies,
    stop_token_ids,
    stream_reply,
)

__all__ = [
    "GenerationOptions",
    "Message",
    "eval_mode",
    "generate_replies",
    "stop_token_ids",
    "stream_reply",
]
