"""Exact match: how many held-out rows a model answers rightly, by generation.

A new way to compare is one function and one row of `COMPARISONS`.
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
    on_progress: Callable[[int, int], None] | None = None,
) -> ExactMatch:
    """Generate the last turn of each conversation and compare it with the one that stands there.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        tokenizer: Its tokenizer, with a chat template.
        conversations: Turns that end with the assistant's reference answer.
        options: How to generate.
        normalise: What counts as the same answer; a name in `COMPARISONS`.
        on_progress: Called after each batch with the rows done and their number.

    Raises:
        ConfigError: An unknown `normalise`.
        DataError: No rows, a row whose last turn is not the assistant's, or a reference that cannot be
            compared.
    """
    if normalise not in COMPARISONS:
        raise ConfigError("key normalise", found=normalise, allowed=COMPARISONS)
    read = COMPARISONS[normalise]
    if not conversations:
        raise DataError("no rows to evaluate", found="0 rows", allowed="at least one")
    references = []
    for number, conversation in enumerate(conversations, start=1):
        if not conversation or conversation[-1]["role"] != "assistant":
            raise DataError(
                f"row {number}: the last turn is not the assistant's",
                found=[message["role"] for message in conversation],
            )
        try:
            references.append(read(conversation[-1]["content"]))
        except ValueError as error:
            raise DataError(
                f"row {number}: the reference cannot be compared as {normalise!r}",
                found=f"{conversation[-1]['content'][:120]!r} ({error})",
            ) from error
    prompts = [list(conversation[:-1]) for conversation in conversations]
    answers = generate_replies(model, tokenizer, prompts, options, on_progress)
    samples = [
        Sample(prompt, conversation[-1]["content"], answer, _reads_as(answer, reference, read))
        for prompt, conversation, answer, reference in zip(prompts, conversations, answers, references, strict=True)
    ]
    num_correct = sum(sample.correct for sample in samples)
    return ExactMatch(num_correct / len(samples), num_correct, len(samples), samples)


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
