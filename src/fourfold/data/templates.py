"""From conversation to tokens: chat templates, and which tokens are the assistant's to learn."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fourfold.data.answers import Rendered, refusals, render
from fourfold.data.row_formats import Kind
from fourfold.data.shapes import Shapes
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
    conversations: list[list[Message]], tokenizer: Any, train_on_prompt: bool = False, shapes: Shapes | None = None
) -> list[Encoded]:
    """Tokens and labels of conversations, by the tokenizer's chat template.

    Learned are the assistant's answers and the token that ends each of them, so that the model learns to
    stop; with `train_on_prompt`, everything is. The template alone writes special tokens: no second BOS is
    added.

    Where the template marks answers by `{% generation %}`, the marks hold. Elsewhere see `fourfold.data.answers`.

    Args:
        conversations: Turns of each, the last one the assistant's.
        tokenizer: A tokenizer that passed `check_tokenizer`.
        train_on_prompt: Whether every token is learned.
        shapes: What is known of the template from batches before, to be quicker; None: nothing.

    Raises:
        DataError: The template refuses a conversation or leaves out a turn, or answers cannot be told from prompts.
            Which conversation it is, is known when there is but one.
    """
    shapes = Shapes() if shapes is None else shapes
    shapes.require_all_turns(tokenizer, conversations)
    if not train_on_prompt and marks_answers(tokenizer):
        return _marked(tokenizer, conversations)
    texts = render(tokenizer, conversations)
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    all_ids: list[list[int]] = encoding["input_ids"]
    if train_on_prompt:
        return [Encoded(input_ids, list(input_ids)) for input_ids in all_ids]
    rendered = [Rendered(*each) for each in zip(conversations, texts, all_ids, encoding.encodings, strict=True)]
    spans = shapes.find_answers(tokenizer, rendered)
    encoded = []
    for input_ids, its_spans in zip(all_ids, spans, strict=True):
        labels = [IGNORE_INDEX] * len(input_ids)
        for first, end, _ in its_spans:
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


def _marked(tokenizer: Any, conversations: list[list[Message]]) -> list[Encoded]:
    with refusals(conversations):
        marked = tokenizer.apply_chat_template(conversations, return_dict=True, return_assistant_tokens_mask=True)
    added = frozenset(tokenizer.added_tokens_decoder)
    encoded = []
    for input_ids, marks in zip(marked["input_ids"], marked["assistant_masks"], strict=True):
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
