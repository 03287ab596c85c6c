"""Talking to a run's result, or to any model."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.errors import InferenceError
from fourfold.hosted import find_hosted, load_models
from fourfold.inference import (
    Engine,
    EngineOptions,
    GenerationOptions,
    Message,
    Request,
    not_in_engine,
    prompt_ids,
    require_template,
    stream_reply,
)
from fourfold.models.underlying import underlying

__all__ = ["ChatSession", "Figures", "chat"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figures:
    """How fast a reply was.

    Args:
        tokens: Generated.
        first_token_seconds: From the question to its first token.
        tokens_per_second: Of those behind the first; None where there is none.
        reused_tokens: Of the prompt, read for an earlier turn already.
    """

    tokens: int
    first_token_seconds: float
    tokens_per_second: float | None
    reused_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def line(self) -> str:
        speed = "" if self.tokens_per_second is None else f", {self.tokens_per_second:,.1f} tokens/s"
        return f"{self.tokens} tokens{speed}, the first after {self.first_token_seconds:.2f} s"


@dataclass
class ChatSession:
    """A model that answers.

    Attributes:
        engine: What answers; None where the model cannot be run by one, and `generate` does.
        figures: Of the last reply that was whole; None before, and without an engine.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    options: GenerationOptions
    engine: Engine | None = field(init=False, default=None)
    figures: Figures | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        try:
            if reason := not_in_engine(underlying(self.model).generation_config):
                raise InferenceError("the model's generation config asks for more than the engine does", found=reason)
            self.engine = Engine(self.model, self.tokenizer, EngineOptions(max_sequences=1, max_length=None))
        except InferenceError as error:
            logger.info("Replies are generated without the engine, which is slower: %s", error)

    def lines(self) -> list[str]:
        """What it takes of the memory."""
        return [] if self.engine is None else self.engine.footprint.lines()

    def reply(self, messages: list[Message]) -> Iterator[str]:
        """The next assistant turn, piece by piece. Leaving the iterator ends it.

        Raises:
            DataError: The tokenizer has no chat template.
            InferenceError: The conversation is longer than the context, or answering it failed.
        """
        self.figures = None
        if self.engine is None:
            yield from stream_reply(self.model, self.tokenizer, messages, self.options)
            return
        require_template(self.tokenizer)
        options, engine = self.options, self.engine
        request = Request(
            tuple(prompt_ids(self.tokenizer, messages)),
            options.sampling(underlying(self.model).generation_config),
            options.max_new_tokens,
            stop=options.stop,
            adapter=self.model.active_adapter if isinstance(self.model, PeftModel) else None,
        )
        sequence = engine.submit(request)
        try:
            while sequence.finish_reason is None:
                for chunk in engine.step():
                    if chunk.sequence is sequence and chunk.text:
                        yield chunk.text
        finally:
            engine.cancel(sequence)
        if sequence.finish_reason == "error":
            raise InferenceError(f"answering failed: {sequence.error}")
        first = sequence.first_token_at or time.monotonic()
        seconds = (sequence.finished_at or first) - first
        behind = len(sequence.token_ids) - 1
        self.figures = Figures(
            tokens=len(sequence.token_ids),
            first_token_seconds=first - sequence.submitted_at,
            tokens_per_second=behind / seconds if behind and seconds else None,
            reused_tokens=sequence.reused,
        )


def chat(model: str, options: GenerationOptions | None = None, **choice: Any) -> ChatSession:
    """Open a conversation with a run's result, or with any model.

    Args:
        model: Folder of a run or of a model, or a hub's name.
        options: How to answer; without it, those that `choice` makes: 512 tokens, greedy.
        choice: Arguments of `GenerationOptions`.

    Raises:
        CheckpointError: There is no model, or no finished run.
        ConfigError: The run's model gives scores and does not write; or a choice that is not allowed.
    """
    options = options or GenerationOptions(**{"max_new_tokens": 512, **choice})
    loaded = load_models(find_hosted(model))
    return ChatSession(loaded.model, loaded.tokenizer, options)
