"""Multiple choice: whether a model takes the right one of several answers to be the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fourfold.errors import DataError
from fourfold.evaluation.likelihood import Continuation, continuation_likelihoods

__all__ = ["Choice", "MultipleChoice", "multiple_choice", "parse_choices"]

_QUESTION_KEYS = ("question", "prompt")


@dataclass(frozen=True)
class Choice:
    """A question with its answers, and the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class MultipleChoice:
    """How many questions were answered rightly.

    Attributes:
        acc: Share of rows whose right answer has the highest log-probability.
        acc_norm: The same with each log-probability divided by its answer's characters, as lm-evaluation-harness does.
        picked: For each row the index of the likeliest answer, without and with that.
        num_tokens: Tokens of answers that were scored.
    """

    acc: float
    acc_norm: float
    picked: list[tuple[int, int]]
    num_tokens: int


def parse_choices(rows: Sequence[Mapping[str, Any]], name: str) -> list[Choice]:
    """Rows of `question` (or `prompt`), `choices` and `answer`: the right one's index, letter (A is the first) or text.

    Args:
        rows: The rows.
        name: What they are called in errors.

    Raises:
        DataError: No rows, or a row that is not so, by its number.
    """
    if not rows:
        raise DataError(f"{name} has no rows", found="0 rows", allowed="at least one")
    return [_parse(row, f"{name}, row {number}") for number, row in enumerate(rows, start=1)]


def _parse(row: Mapping[str, Any], where: str) -> Choice:
    question = next((row[key] for key in _QUESTION_KEYS if row.get(key)), None)
    if not isinstance(question, str):
        raise DataError(f"{where}: no question", found=", ".join(row), allowed=_QUESTION_KEYS)
    choices = row.get("choices")
    is_list = isinstance(choices, list) and len(choices) > 1
    if not is_list or not all(isinstance(choice, str) and choice for choice in choices or ()):
        raise DataError(f"{where}: no choices", found=repr(choices)[:120], allowed="a list of two texts or more")
    assert isinstance(choices, list)
    if len(set(choices)) < len(choices):
        raise DataError(f"{where}: a choice stands twice", found=repr(choices)[:120])
    return Choice(question, tuple(choices), _answer(row.get("answer"), choices, where))


def _answer(answer: Any, choices: list[str], where: str) -> int:
    # A text that is one of the choices is meant as such, also where it looks like a letter or a number.
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and "A" <= answer.upper() <= "Z":
        answer = ord(answer.upper()) - ord("A")
    elif isinstance(answer, str) and answer.isdecimal():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: the answer is none of the choices",
            found=repr(answer)[:120],
            allowed=f"0 to {len(choices) - 1}, A to {chr(ord('A') + len(choices) - 1)}, or a choice's text",
        )
    return answer


def multiple_choice(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Choice],
    *,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> MultipleChoice:
    """Score each answer after its question, and take the likeliest.

    The question stands as it is, and a choice follows after a space; with `apply_chat_template` the question is the
    user's turn and the choice what the assistant's begins with.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        tokenizer: Its tokenizer.
        rows: The questions.
        batch_size: Answers scored at a time.
        apply_chat_template: Ask by the tokenizer's chat template.
        on_progress: Called after each batch with the answers done and their number.

    Raises:
        DataError: No rows, or no chat template to apply.
    """
    if not rows:
        raise DataError("no rows to evaluate", found="0 rows", allowed="at least one")
    if apply_chat_template and not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template", hint="set the key chat_template")
    pairs = [
        _continuation(tokenizer, row.question, choice, apply_chat_template) for row in rows for choice in row.choices
    ]
    likelihoods = continuation_likelihoods(model, pairs, batch_size, on_progress)
    picked, place = [], 0
    for row in rows:
        own = likelihoods[place : place + len(row.choices)]
        place += len(own)
        plain = [found.log_prob for found in own]
        normalised = [log_prob / len(choice) for log_prob, choice in zip(plain, row.choices, strict=True)]
        picked.append((plain.index(max(plain)), normalised.index(max(normalised))))
    acc, acc_norm = (
        sum(choice[which] == row.answer for choice, row in zip(picked, rows, strict=True)) / len(rows)
        for which in (0, 1)
    )
    return MultipleChoice(acc, acc_norm, picked, sum(found.num_tokens for found in likelihoods))


def _continuation(tokenizer: Any, question: str, choice: str, as_chat: bool) -> Continuation:
    """Question and choice are tokenized together, as they would be written, and parted where the question ends."""
    if as_chat:
        turn = [{"role": "user", "content": question}]
        before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        after = choice
    else:
        before, after = question.rstrip(), " " + choice
    # A template writes the tokens that a text begins with itself.
    whole = tokenizer(before + after, add_special_tokens=not as_chat)["input_ids"]
    ids = tokenizer(before, add_special_tokens=not as_chat)["input_ids"]
    shared = next((place for place, (one, other) in enumerate(zip(ids, whole, strict=False)) if one != other), None)
    length = len(ids) if shared is None else shared
    return whole[:length], whole[length:]
