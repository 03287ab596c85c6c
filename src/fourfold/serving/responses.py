"""The bodies of answers, as OpenAI has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel

from fourfold.inference.requests import TokenLogprob
from fourfold.serving.constraints import Grammars

__all__ = [
    "ChatCompletion",
    "Completion",
    "ErrorBody",
    "ModelCard",
    "ModelList",
    "Usage",
    "chat_logprobs",
    "completion_logprobs",
    "usage_of",
]

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatTokenLogprob]


class ChatMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model by its name; `root` is the base's name, and `is_adapter` whether it is the base with an adapter."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fourfold"
    root: str | None
    is_adapter: bool
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def usage_of(num_prompt: int, num_completion: int) -> dict[str, Any]:
    """What was cached is not told: it would say how another user's prompt begins."""
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
    }


def chat_logprobs(logprobs: Sequence[TokenLogprob], grammars: Grammars) -> dict[str, Any]:
    """A token that is part of a character has U+FFFD as its text, and its own bytes."""

    def shown(token_id: int, logprob: float) -> dict[str, Any]:
        raw = grammars.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(raw)}

    return {
        "content": [
            shown(token.token_id, token.logprob) | {"top_logprobs": [shown(*each) for each in token.top]}
            for token in logprobs
        ]
    }


def completion_logprobs(logprobs: Sequence[TokenLogprob], grammars: Grammars, offset: int) -> dict[str, Any]:
    """`offset` is the number of characters before the first of these tokens."""

    def text(token_id: int) -> str:
        return grammars.token_bytes(token_id).decode("utf-8", "replace")

    def key(token_id: int) -> str:
        """Parts of characters are told apart, as OpenAI does it."""
        raw = grammars.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    tokens = [text(token.token_id) for token in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(token.logprob) for token in logprobs],
        "top_logprobs": [{key(each): _finite(value) for each, value in reversed(token.top)} for token in logprobs],
        "text_offset": offsets,
    }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI tells -9999 for what has no probability left."""
    return max(logprob, -9999.0)
