"""What an engine is asked, and what it answers."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from fourfold.errors import InferenceError
from fourfold.inference.logprobs import TokenLogprob
from fourfold.inference.sampling import SamplingOptions

__all__ = ["Chunk", "Constraint", "FinishReason", "Request", "Sequence", "TokenLogprob"]

FinishReason = Literal["stop", "length", "cancelled", "error"]

MOST_LOGPROBS = 20


class Constraint(Protocol):
    """Which tokens may come next. One object belongs to one request."""

    def mask(self, token_ids: list[int]) -> Tensor:
        """bool [vocab] on the CPU, true for what may follow these generated tokens; shorter than the model's
        vocabulary leaves the rest out."""
        ...

    def advance(self, token_id: int) -> None:
        """This token was chosen."""
        ...


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Args:
        prompt_ids: Its tokens, at least one.
        sampling: How tokens are chosen.
        max_new_tokens: Tokens the answer may have; the context's end may come before.
        stop: Texts that end the answer and are not part of it.
        logprobs: How many of the likeliest tokens are told with each token, 0 to 20; None for no log-probabilities.
        adapter: Name of the adapter that answers; None for the base.
        constraint: Which tokens may come.
        ignore_eos: Whether stop tokens are tokens like others.

    Raises:
        InferenceError: A value that is not allowed.
    """

    prompt_ids: tuple[int, ...]
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    adapter: str | None = None
    constraint: Constraint | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        # Lists are as good.
        object.__setattr__(self, "prompt_ids", tuple(self.prompt_ids))
        object.__setattr__(self, "stop", tuple(self.stop))
        if not self.prompt_ids:
            raise InferenceError("a prompt of no tokens", allowed="at least 1")
        if self.max_new_tokens < 1:
            raise InferenceError("max_new_tokens", found=self.max_new_tokens, allowed="at least 1")
        if "" in self.stop:
            raise InferenceError("an empty stop string", allowed="texts of at least one character")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InferenceError("logprobs", found=self.logprobs, allowed=f"0 to {MOST_LOGPROBS}")


_numbers = itertools.count()


@dataclass(eq=False)
class Sequence:
    """A request on its way through the engine.

    Attributes:
        number: Unlike any other's in this process.
        token_ids: Generated so far, the stop token included.
        text: What was given of the answer so far.
        finish_reason: None while it runs: "stop" for a stop token or text, "length", "cancelled" or "error".
        error: What went wrong, with "error".
        reused: Tokens of the prompt that were in the cache already.
        submitted_at, first_token_at, finished_at: Seconds of `time.monotonic`.
    """

    request: Request
    number: int = field(default_factory=lambda: next(_numbers))
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    reused: int = 0
    submitted_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True)
class Chunk:
    """What a step gave one sequence.

    Args:
        sequence: Whose.
        text: Its next piece; "" while text is held back that may be the beginning of a stop string or of a character.
        token_ids: The tokens that were generated.
        logprobs: Of each of these, if asked for.
        finish_reason: Set on the last chunk of a sequence, and only there.
    """

    sequence: Sequence
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
