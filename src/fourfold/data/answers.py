"""Where the assistant's answers stand in a conversation as its template renders it.

An answer starts where the template's rendering of the turns before it, with the generation prompt, ends, and ends with
the last added token of its turn.
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jinja2
from tokenizers import Encoding

from fourfold.data.turns import Message
from fourfold.errors import DataError

__all__ = ["AnswerSpan", "Rendered", "find_answers", "refusals", "render"]


class AnswerSpan(NamedTuple):
    """An answer with the token that ends it: tokens [first, end), from the character `start` of the rendering on."""

    first: int
    end: int
    start: int


class Rendered(NamedTuple):
    """A conversation, what the template makes of it, and its tokens with their places in that."""

    messages: list[Message]
    text: str
    input_ids: list[int]
    encoding: Encoding


def find_answers(tokenizer: Any, conversations: Sequence[Rendered]) -> list[list[AnswerSpan]]:
    """The answers of each conversation, by rendering it up to each turn.

    Raises:
        DataError: They cannot be told from the prompts.
    """
    beginnings = _Beginnings(tokenizer, [one.messages for one in conversations])
    added = frozenset(tokenizer.added_tokens_decoder)
    return [_answer_spans(one, beginnings, added) for one in conversations]


@contextlib.contextmanager
def refusals(conversations: Sequence[list[Message]]) -> Iterator[None]:
    """Makes DataErrors of what the template raises, with the roles where there is but one conversation."""
    try:
        yield
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in conversations[0]] if len(conversations) == 1 else None
        raise DataError(
            "the chat template refuses the conversation",
            found=f"{error}; roles {roles}" if roles else error,
            allowed="roles that the template knows, in the order it wants",
            hint="change such rows, or set the key chat_template to a template that takes them",
        ) from error


def render(tokenizer: Any, conversations: Sequence[list[Message]], add_generation_prompt: bool = False) -> list[str]:
    """The texts of conversations. Raises DataError where the template refuses one."""
    with refusals(conversations):
        texts: list[str] = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    return texts


class _Beginnings:
    """The beginnings of conversations as the template renders them, made by one call for each kind."""

    def __init__(self, tokenizer: Any, conversations: list[list[Message]]) -> None:
        self._tokenizer = tokenizer
        places = [
            (id(messages), index, messages)
            for messages in conversations
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        before = [messages[:index] for _, index, messages in places]
        prompts = render(tokenizer, before, add_generation_prompt=True) if before else []
        self._prompts = {(key, index): text for (key, index, _), text in zip(places, prompts, strict=True)}
        inner = [place for place in places if place[1] < len(place[2]) - 1]
        within = render(tokenizer, [messages[: index + 1] for _, index, messages in inner]) if inner else []
        self._turns = {(key, index + 1): text for (key, index, _), text in zip(inner, within, strict=True)}

    def prompt(self, messages: list[Message], count: int) -> str:
        """The first `count` turns and the generation prompt."""
        return self._prompts[id(messages), count]

    def turns(self, messages: list[Message], count: int) -> str:
        """The first `count` turns."""
        made = self._turns.get((id(messages), count))
        return render(self._tokenizer, [messages[:count]])[0] if made is None else made


def _answer_spans(rendered: Rendered, beginnings: _Beginnings, added: frozenset[int]) -> list[AnswerSpan]:
    messages, text, input_ids, encoding = rendered
    offsets = encoding.offsets
    stops = [stop for _, stop in offsets]
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _answer_start(messages, index, text, beginnings)
        up_to_here = text if index == len(messages) - 1 else beginnings.turns(messages, index + 1)
        # A token that straddles the border holds the answer's first character, so it is learned.
        first = bisect.bisect_right(stops, start)
        if text.startswith(up_to_here):
            within = range(bisect.bisect_right(stops, len(up_to_here)) - 1, first - 1, -1)
            end = next((position for position in within if input_ids[position] in added), None)
            rest = None if end is None else text[offsets[end][1] : len(up_to_here)]
        else:
            # Templates that write a turn otherwise once others follow (Qwen3 drops its thoughts): find the
            # answer.
            content = message["content"].strip()
            stop = text.find(content, start) + len(content)
            if stop < start + len(content):
                raise _cannot_split(index, "the template rewrites this answer once other turns follow")
            after = [position for position in range(first, len(offsets)) if offsets[position][0] >= stop]
            end = next((position for position in after if input_ids[position] in added), None)
            rest = None if end is None else text[stop : offsets[end][0]]
        if end is None or rest is None or rest.strip():
            raise _cannot_split(index, "no special token ends the answer, so the model could not learn to stop")
        spans.append(AnswerSpan(first, end + 1, start))
    return spans


def _answer_start(messages: list[Message], count: int, text: str, beginnings: _Beginnings) -> int:
    """Where the answer to the first `count` turns starts in `text`, in characters."""
    prompt = beginnings.prompt(messages, count)
    if text.startswith(prompt):
        return len(prompt)
    # Generation prompts may open thoughts ("<think>") that a recorded answer does not have: then the common
    # part is the prompt, if it holds all turns before.
    if not text.startswith(beginnings.turns(messages, count)):
        raise _cannot_split(count, "the turns before it are rendered otherwise once it follows")
    return next(
        position for position in range(len(prompt)) if position == len(text) or text[position] != prompt[position]
    )


def _cannot_split(index: int, reason: str) -> DataError:
    return DataError(
        f"the chat template cannot be split into prompts and answers at turn {index + 1}",
        found=reason,
        allowed="turns that are appended and closed by a special token, or {% generation %} marks",
        hint="set the key chat_template to such a template, or train_on_prompt: true to learn every token",
    )
