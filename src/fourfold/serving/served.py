"""What a server serves: an engine, the names of its models; and prompts of what requests hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from fourfold.inference import prompt_ids
from fourfold.inference.engine import Engine
from fourfold.serving.errors import ApiError
from fourfold.serving.requests import Message

__all__ = ["Prompter", "Served"]


@dataclass(frozen=True)
class Served:
    """A model that is loaded.

    Args:
        engine: It, on its device; from now on the server alone calls it.
        models: The names by which requests ask, each with the name of its adapter in the engine; None: the base.
            The first is the page's choice.
    """

    engine: Engine
    models: Mapping[str, str | None]


class Prompter:
    """Makes a prompt's tokens of what a request holds.

    Not to be called by several threads at once: a tokenizer of Rust refuses to be borrowed twice.
    """

    def __init__(self, tokenizer: Any, max_length: int, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = vocab_size

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Raises ApiError for turns that the template refuses, or that are too long."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "the model has no chat template; /v1/completions continues a text", param="messages")
        turns = [{"role": turn.role, "content": turn.text()} for turn in messages]
        try:
            ids = prompt_ids(self._tokenizer, turns)
        except jinja2.TemplateError as error:
            raise ApiError(400, f"the model's chat template refuses the messages: {error}", param="messages") from error
        return self._checked(ids, "messages")

    def text(self, prompt: str | list[int]) -> list[int]:
        """Raises ApiError for tokens that the model does not have, and for no or too many."""
        if isinstance(prompt, str):
            return self._checked(prompt_ids(self._tokenizer, prompt), "prompt")
        if any(token >= self._vocab_size for token in prompt):
            raise ApiError(400, f"prompt: token ids must be below {self._vocab_size}", param="prompt")
        return self._checked(prompt, "prompt")

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if not ids:
            raise ApiError(400, f"{param} has no tokens", param=param)
        if len(ids) >= self._max_length:
            raise ApiError(
                400,
                f"This model's maximum context length is {self._max_length} tokens, of which at least one is for the "
                f"answer; {param} has {len(ids)}",
                param=param,
                code="context_length_exceeded",
            )
        return ids
