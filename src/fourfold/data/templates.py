"""From conversation to tokens: chat templates, and which tokens are the assistant's to learn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jinja2

from fourfold.data.row_formats import Message
from fourfold.errors import DataError

__all__ = ["IGNORE_INDEX", "Encoded", "check_tokenizer", "encode_conversation"]

IGNORE_INDEX = -100
"""The label that PyTorch's cross entropy leaves out."""

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|endoftext|>")
"""Tokens that model families keep for padding, or that no chat turn holds, in order of preference."""

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens.

    Attributes:
        input_ids: Token ids, [seq].
        labels: The same ids where they are learned, -100 elsewhere, [seq]. Not shifted: the model does that.
    """

    input_ids: list[int]
    labels: list[int]


def check_tokenizer(tokenizer: Any) -> None:
    """Check that conversations can be encoded, padded and taken apart again.

    A tokenizer without a pad token is given one of its own tokens that is kept for such use (`PAD_TOKENS`,
    then the unknown token). The end-of-sequence token is never chosen: where padding is recognized by its id,
    a model trained with EOS as padding does not learn to stop.

    Raises:
        DataError: No chat template, no pad token and none to choose, or a tokenizer without character
            offsets.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not tokenizer.chat_template:
        raise DataError(
            f"tokenizer {name} has no chat template",
            allowed="a template in the tokenizer, or one given by the key chat_template",
            hint="take the instruct version of the model, or set the key chat_template",
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {name} gives no character offsets",
            found=type(tokenizer).__name__,
            allowed="a fast tokenizer (tokenizer.json)",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _dedicated_pad_token(tokenizer, name)


def _dedicated_pad_token(tokenizer: Any, name: str) -> str:
    vocabulary = tokenizer.get_vocab()
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    for token in (*PAD_TOKENS, tokenizer.unk_token):
        if token in vocabulary and token not in taken:
            return str(token)
    raise DataError(
        f"tokenizer {name} has no pad token",
        found=f"eos_token {tokenizer.eos_token!r}, no token kept for padding",
        allowed="a token that no conversation holds",
        hint="set the key pad_token to such a token of the tokenizer",
    )


def encode_conversation(messages: list[Message], tokenizer: Any, train_on_prompt: bool = False) -> Encoded:
    """Tokens and labels of one conversation, by the tokenizer's chat template.

    Learned are the assistant's answers and the token that ends each of them, so that the model learns to
    stop; with `train_on_prompt`, everything is. The template alone writes special tokens: no second BOS is
    added.

    Where the template marks answers by `{% generation %}`, the marks hold. Elsewhere an answer starts where
    the template's rendering of the turns before it, with the generation prompt, ends, and ends with the last
    added token of its turn.

    Args:
        messages: Turns, the last one the assistant's.
        tokenizer: A tokenizer that passed `check_tokenizer`.
        train_on_prompt: Whether every token is learned.

    Raises:
        DataError: The template refuses the conversation, or answers cannot be told from prompts.
    """
    text = _render(tokenizer, messages)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids: list[int] = encoding["input_ids"]
    if train_on_prompt:
        return Encoded(input_ids, list(input_ids))
    if _GENERATION_MARKER.search(tokenizer.get_chat_template()):
        learned = _marked_tokens(tokenizer, messages, input_ids)
    else:
        spans = _answer_spans(tokenizer, messages, text, input_ids, encoding["offset_mapping"])
        learned = [False] * len(input_ids)
        for first, end in spans:
            learned[first:end] = [True] * (end - first)
    labels = [token if is_learned else IGNORE_INDEX for token, is_learned in zip(input_ids, learned, strict=True)]
    return Encoded(input_ids, labels)


def _render(tokenizer: Any, messages: list[Message], add_generation_prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise DataError(
            "the chat template refuses the conversation",
            found=f"{error}; roles {[message['role'] for message in messages]}",
        ) from error
    return text


def _marked_tokens(tokenizer: Any, messages: list[Message], input_ids: list[int]) -> list[bool]:
    marked = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    learned = [bool(mark) for mark in marked["assistant_masks"]]
    added = tokenizer.added_tokens_decoder
    for end in [end for end in range(1, len(learned)) if learned[end - 1] and not learned[end]]:
        # Some templates close the mark before the token that ends the turn.
        last = end - 1
        while learned[last] and not tokenizer.decode([input_ids[last]]).strip():
            last -= 1
        learned[end] = input_ids[last] not in added and input_ids[end] in added
    return learned


def _answer_spans(
    tokenizer: Any, messages: list[Message], text: str, input_ids: list[int], offsets: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Token ranges [first, end) of the assistant's answers, each with the token that ends it."""
    added = tokenizer.added_tokens_decoder
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _answer_start(tokenizer, messages[:index], text)
        rendered = text if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1])
        # A token that straddles the border holds the answer's first character, so it is learned.
        first = next(position for position, (_, stop) in enumerate(offsets) if stop > start)
        if text.startswith(rendered):
            within = [position for position in range(first, len(offsets)) if offsets[position][1] <= len(rendered)]
            end = next((position for position in reversed(within) if input_ids[position] in added), None)
            rest = None if end is None else text[offsets[end][1] : len(rendered)]
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
        spans.append((first, end + 1))
    return spans


def _answer_start(tokenizer: Any, before: list[Message], text: str) -> int:
    """Where the answer to `before` starts in `text`, in characters."""
    prompt = _render(tokenizer, before, add_generation_prompt=True)
    if text.startswith(prompt):
        return len(prompt)
    # Generation prompts may open thoughts ("<think>") that a recorded answer does not have: then the common
    # part is the prompt, if it holds all turns before.
    if not text.startswith(_render(tokenizer, before)):
        raise _cannot_split(len(before), "the turns before it are rendered otherwise once it follows")
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
