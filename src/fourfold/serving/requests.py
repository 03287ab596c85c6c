"""The bodies of requests: OpenAI's fields, and of others' those that sampling needs.

Fields that the server does not know are ignored, since clients send many. Those that it knows and cannot do are
refused, but for the values that ask for nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "JsonObject",
    "JsonSchema",
    "Message",
    "ResponseFormat",
    "Sampling",
    "StreamOptions",
    "TextPart",
]

# A prompt's or a seed's numbers go into int64 tensors.
_LARGEST = 2**63 - 1
_MOST_BIASES = 1024
TokenId = Annotated[int, Field(ge=0, le=_LARGEST)]


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("a surrogate without its other half") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class TextPart(_Body):
    """A part of a message; a model of language takes texts alone."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One turn."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | list[TextPart] | None = None
    name: str | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(_Body):
    include_usage: bool | None = None


class PlainText(_Body):
    type: Literal["text"]


class JsonObject(_Body):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Body):
    name: Annotated[str, Field(max_length=256)] = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JsonSchema(_Body):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainText | JsonObject | JsonSchema, Field(discriminator="type")]


class Sampling(_Body):
    """What chat and completions share."""

    model: Annotated[Text, Field(min_length=1, max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=_LARGEST)] | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=_MOST_BIASES, description="By token id: added to the logit of each."),
        ]
        | None
    ) = None
    # Not OpenAI's, but vLLM's and others' names.
    top_k: Annotated[int, Field(ge=-1, le=_LARGEST, description="0 or -1: all tokens.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # Beyond these no logit would be left to choose by.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if any(not text or len(text) > 256 for text in self.stop_strings()):
            raise ValueError("stop: each text must have 1 to 256 characters")
        return self

    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Sampling):
    """The body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=_LARGEST)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None

    @model_validator(mode="after")
    def _refuse_tools(self) -> ChatRequest:
        if self.tools or self.functions:
            raise ValueError("tools and functions are not supported; response_format gives answers of a schema")
        if self.modalities and self.modalities != ["text"]:
            raise ValueError("modalities: only text is supported")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens told beside the one taken; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """The body of `/v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _refuse_old_fields(self) -> CompletionRequest:
        if self.echo:
            raise ValueError("echo is not supported")
        if self.suffix:
            raise ValueError("suffix is not supported")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not supported; n gives several answers")
        return self

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [list(self.prompt)]
        return list(self.prompt)
