"""From conversation to tokens: chat templates, and which tokens are the assistant's to learn."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from typing import Any

import jinja2

from fourfold.data.row_formats import Kind
from fourfold.data.turns import Message
from fourfold.errors import DataError

__all__ = [
    "IGNORE_INDEX",
    "Encoded",
    "check_tokenizer",
    "encode_conversation",
    "encode_conversations",
    "encode_documents",
    "marks_answers",
    "num_supervised",
]

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


def num_supervised(labels: list[int]) -> int:
    """Labels that the shifted loss sees: the first token has nothing before it to be predicted from."""
    return len(labels[1:]) - labels[1:].count(IGNORE_INDEX)


def check_tokenizer(tokenizer: Any, *, kind: Kind | None = "conversation") -> None:
    """Check that rows can be encoded, padded and taken apart again.

    A tokenizer without a pad token is given one of its own tokens that is kept for such use (`PAD_TOKENS`,
    then the unknown token). The end-of-sequence token is never chosen: where padding is recognized by its id,
    a model trained with EOS as padding does not learn to stop.

    Args:
        tokenizer: The tokenizer of a model.
        kind: What the rows are; documents need no chat template, but a token that ends them. None: not known yet.

    Raises:
        DataError: No chat template, no token that ends a document, no pad token and none to choose, or a tokenizer
            without character offsets.
    """
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    if not tokenizer.chat_template and kind not in ("document", None):
        raise DataError(
            f"tokenizer {name} has no chat template",
            allowed="a template in the tokenizer, or one given by the key chat_template",
            hint="take the instruct version of the model, or set the key chat_template",
        )
    if kind == "document" and tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {name} has no eos token, so documents would have no end", allowed="one with eos_token"
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
    """Tokens and labels of one conversation; see `encode_conversations`."""
    return encode_conversations([messages], tokenizer, train_on_prompt)[0]


def encode_conversations(
    conversations: list[list[Message]], tokenizer: Any, train_on_prompt: bool = False
) -> list[Encoded]:
    """Tokens and labels of conversations, by the tokenizer's chat template.

    Learned are the assistant's answers and the token that ends each of them, so that the model learns to
    stop; with `train_on_prompt`, everything is. The template alone writes special tokens: no second BOS is
    added.

    Where the template marks answers by `{% generation %}`, the marks hold. Elsewhere an answer starts where
    the template's rendering of the turns before it, with the generation prompt, ends, and ends with the last
    added token of its turn.

    Args:
        conversations: Turns of each, the last one the assistant's.
        tokenizer: A tokenizer that passed `check_tokenizer`.
        train_on_prompt: Whether every token is learned.

    Raises:
        DataError: The template refuses a conversation, or answers cannot be told from prompts. Which conversation it
            is, is known when there is but one.
    """
    texts = _render(tokenizer, conversations)
    by_marks = marks_answers(tokenizer)
    needs_offsets = not train_on_prompt and not by_marks
    encoding = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=needs_offsets, return_attention_mask=False
    )
    all_ids: list[list[int]] = encoding["input_ids"]
    if train_on_prompt:
        return [Encoded(input_ids, list(input_ids)) for input_ids in all_ids]
    if by_marks:
        return _marked(tokenizer, conversations, all_ids)
    rendered = _Renderings(tokenizer, conversations)
    added = frozenset(tokenizer.added_tokens_decoder)
    encoded = []
    for number, (messages, input_ids) in enumerate(zip(conversations, all_ids, strict=True)):
        offsets = encoding["offset_mapping"][number]
        labels = [IGNORE_INDEX] * len(input_ids)
        for first, end in _answer_spans(messages, texts[number], input_ids, offsets, rendered, added):
            labels[first:end] = input_ids[first:end]
        encoded.append(Encoded(input_ids, labels))
    return encoded


def encode_documents(texts: list[str], tokenizer: Any, max_length: int) -> list[list[Encoded]]:
    """Tokens of plain texts: for each text its pieces, the last of which ends with the end-of-sequence token.

    Every token is learned, once: a piece begins with the last token of the one before, from which its first new token
    is predicted. The tokenizer's own BOS stands before a text, if it has one.

    Args:
        texts: Documents; an empty one has no pieces.
        tokenizer: A tokenizer that passed `check_tokenizer`.
        max_length: Tokens a piece may have.
    """
    whole = tokenizer(texts, return_attention_mask=False)["input_ids"]
    end = tokenizer.eos_token_id
    documents: list[list[Encoded]] = []
    for text, tokens in zip(texts, whole, strict=True):
        if not text.strip():
            documents.append([])
            continue
        if tokens[-1] != end:
            # Some tokenizers write it themselves.
            tokens = [*tokens, end]
        starts = range(0, max(len(tokens) - 1, 1), max_length - 1)
        pieces = [tokens[start : start + max_length] for start in starts]
        documents.append([Encoded(piece, piece) for piece in pieces])
    return documents


def marks_answers(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template marks answers by `{% generation %}`."""
    return _GENERATION_MARKER.search(tokenizer.get_chat_template()) is not None


def _render(tokenizer: Any, conversations: list[list[Message]], add_generation_prompt: bool = False) -> list[str]:
    try:
        texts: list[str] = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except jinja2.TemplateError as error:
        roles = [message["role"] for message in conversations[0]] if len(conversations) == 1 else None
        raise DataError(
            "the chat template refuses the conversation", found=f"{error}; roles {roles}" if roles else error
        ) from error
    return texts


class _Renderings:
    """The beginnings of conversations as the template renders them, made by one call for each kind.

    `prompts[id(messages), n]`: the first n turns with the generation prompt; `turns`: without it.
    """

    def __init__(self, tokenizer: Any, conversations: list[list[Message]]) -> None:
        self._tokenizer = tokenizer
        places = [
            (id(messages), index, messages)
            for messages in conversations
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        before = [messages[:index] for _, index, messages in places]
        prompts = _render(tokenizer, before, add_generation_prompt=True)
        self._prompts = {(key, index): text for (key, index, _), text in zip(places, prompts, strict=True)}
        inner = [place for place in places if place[1] < len(place[2]) - 1]
        within = _render(tokenizer, [messages[: index + 1] for _, index, messages in inner]) if inner else []
        self._turns = {(key, index + 1): text for (key, index, _), text in zip(inner, within, strict=True)}

    def prompt(self, messages: list[Message], count: int) -> str:
        """The first `count` turns and the generation prompt."""
        return self._prompts[id(messages), count]

    def turns(self, messages: list[Message], count: int) -> str:
        """The first `count` turns."""
        made = self._turns.get((id(messages), count))
        return _render(self._tokenizer, [messages[:count]])[0] if made is None else made


def _marked(tokenizer: Any, conversations: list[list[Message]], all_ids: list[list[int]]) -> list[Encoded]:
    marked = tokenizer.apply_chat_template(conversations, return_dict=True, return_assistant_tokens_mask=True)
    added = frozenset(tokenizer.added_tokens_decoder)
    encoded = []
    for input_ids, marks in zip(all_ids, marked["assistant_masks"], strict=True):
        learned = [bool(mark) for mark in marks]
        for end in [end for end in range(1, len(learned)) if learned[end - 1] and not learned[end]]:
            # Some templates close the mark before the token that ends the turn.
            last = end - 1
            while learned[last] and not tokenizer.decode([input_ids[last]]).strip():
                last -= 1
            learned[end] = input_ids[last] not in added and input_ids[end] in added
        labels = [token if is_learned else IGNORE_INDEX for token, is_learned in zip(input_ids, learned, strict=True)]
        encoded.append(Encoded(input_ids, labels))
    return encoded


def _answer_spans(
    messages: list[Message],
    text: str,
    input_ids: list[int],
    offsets: list[tuple[int, int]],
    rendered: _Renderings,
    added: frozenset[int],
) -> list[tuple[int, int]]:
    """Token ranges [first, end) of the assistant's answers, each with the token that ends it."""
    stops = [stop for _, stop in offsets]
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _answer_start(messages, index, text, rendered)
        up_to_here = text if index == len(messages) - 1 else rendered.turns(messages, index + 1)
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
        spans.append((first, end + 1))
    return spans


def _answer_start(messages: list[Message], count: int, text: str, rendered: _Renderings) -> int:
    """Where the answer to the first `count` turns starts in `text`, in characters."""
    prompt = rendered.prompt(messages, count)
    if text.startswith(prompt):
        return len(prompt)
    # Generation prompts may open thoughts ("<think>") that a recorded answer does not have: then the common
    # part is the prompt, if it holds all turns before.
    if not text.startswith(rendered.turns(messages, count)):
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
