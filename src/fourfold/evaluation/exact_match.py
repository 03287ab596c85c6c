"""Exact match: how many held-out rows a model answers rightly, by generation.

A new way to compare is one function and one row of `COMPARISONS`. A pattern takes out of an answer what is compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from fourfold.errors import ConfigError, DataError
from fourfold.inference import GenerationOptions, Message, generate_replies

__all__ = ["COMPARISONS", "ExactMatch", "Sample", "exact_match"]


@dataclass(frozen=True)
class Sample:
    """One row: the turns before the answer, the one wanted, the one given, whether they are the same."""

    prompt: list[Message]
    expected: str
    answer: str
    correct: bool


@dataclass(frozen=True)
class ExactMatch:
    """Share of rows answered rightly (0 to 1), the count, and every row in its order."""

    score: float
    num_correct: int
    num_rows: int
    samples: list[Sample]


def exact_match(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Message]],
    options: GenerationOptions,
    normalise: str = "strip",
    pattern: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> ExactMatch:
    """Generate the last turn of each conversation and compare it with the one that stands there.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        tokenizer: Its tokenizer, with a chat template.
        conversations: Turns that end with the assistant's reference answer.
        options: How to generate.
        normalise: What counts as the same answer; a name in `COMPARISONS`.
        pattern: Regular expression whose last match in an answer is compared, its first group if it has one; an answer
            without a match is wrong. References are read so too, unless it matches in none of them: then they are
            what is to be found.
        on_progress: Called after each batch with the rows done and their number.

    Raises:
        ConfigError: An unknown `normalise`, or a `pattern` that is none.
        DataError: No rows, a row whose last turn is not the assistant's, or a reference that cannot be
            compared.
    """
    if normalise not in COMPARISONS:
        raise ConfigError("key normalise", found=normalise, allowed=COMPARISONS)
    read = COMPARISONS[normalise]
    if not conversations:
        raise DataError("no rows to evaluate", found="0 rows", allowed="at least one")
    for number, conversation in enumerate(conversations, start=1):
        if not conversation or conversation[-1]["role"] != "assistant":
            raise DataError(
                f"row {number}: the last turn is not the assistant's",
                found=[message["role"] for message in conversation],
            )
    expected = [conversation[-1]["content"] for conversation in conversations]
    if pattern is not None:
        read = _reading_matches(pattern, read)
    references = _read_references(expected, normalise, read, COMPARISONS[normalise], pattern)
    prompts = [list(conversation[:-1]) for conversation in conversations]
    answers = generate_replies(model, tokenizer, prompts, options, on_progress)
    samples = [
        Sample(prompt, wanted, answer, _reads_as(answer, reference, read))
        for prompt, wanted, answer, reference in zip(prompts, expected, answers, references, strict=True)
    ]
    num_correct = sum(sample.correct for sample in samples)
    return ExactMatch(num_correct / len(samples), num_correct, len(samples), samples)


def _read_references(
    expected: Sequence[str],
    normalise: str,
    read: Callable[[str], object],
    read_whole: Callable[[str], object],
    pattern: str | None,
) -> list[object]:
    if pattern is not None and not any(re.search(pattern, text) for text in expected):
        read = read_whole
    references = []
    for number, text in enumerate(expected, start=1):
        try:
            references.append(read(text))
        except ValueError as error:
            raise DataError(
                f"row {number}: the reference cannot be compared as {normalise!r}", found=f"{text[:120]!r} ({error})"
            ) from error
    return references


def _reading_matches(pattern: str, read: Callable[[str], object]) -> Callable[[str], object]:
    """`read` of the last match. Raises ConfigError for no regular expression."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError("key pattern is no regular expression", found=f"{pattern!r}: {error}") from error

    def read_match(text: str) -> object:
        matches = list(compiled.finditer(text))
        taken = matches[-1][1 if compiled.groups else 0] if matches else None
        if taken is None:
            raise ValueError(f"{pattern!r} does not match")
        return read(taken)

    return read_match


def _reads_as(answer: str, reference: object, read: Callable[[str], object]) -> bool:
    try:
        return read(answer) == reference
    except ValueError:
        return False


def _stripped(text: str) -> str:
    return text.strip()


def _json_value(text: str) -> object:
    """The JSON value of `text`, made so that == is JSON's equality.

    Raises:
        ValueError: Anything but one JSON value (RFC 8259): NaN, a key twice, text around it.
    """
    try:
        value = json.loads(
            text, parse_float=Decimal, parse_constant=_no_constant, object_pairs_hook=_object_without_twins
        )
    except RecursionError:
        # A model that repeats itself writes brackets without end.
        raise ValueError("nested too deeply") from None
    return _typed(value)


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _object_without_twins(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key stands twice")
    return result


def _typed(value: object) -> object:
    """`value` with booleans marked, since Python takes true for 1."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_typed(item) for item in value]
    return ("boolean", value) if isinstance(value, bool) else value


def _final_number(text: str) -> Decimal:
    """The last number after `####`, which is how GSM8K writes its answers; thousands may be set off by
    commas.

    Raises:
        ValueError: No `####`, or no number after it.
    """
    _, mark, tail = text.rpartition("####")
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", tail)
    if not mark or not numbers:
        raise ValueError("no number after ####")
    return Decimal(numbers[-1].replace(",", ""))


COMPARISONS: dict[str, Callable[[str], object]] = {
    "strip": _stripped,
    "json": _json_value,
    "number": _final_number,
}
"""What of an answer is compared; a ValueError says that the answer cannot be read so."""
