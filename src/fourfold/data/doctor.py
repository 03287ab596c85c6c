"""What is wrong with rows, a template and a split, before anything is trained on them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets
import numpy as np

from fourfold.data.encoding import RecognisedRows, encode, recognise
from fourfold.data.options import DataOptions
from fourfold.data.packing import numbers_of
from fourfold.data.report import named
from fourfold.data.row_formats import ROW_FORMATS
from fourfold.data.templates import IGNORE_INDEX, check_tokenizer
from fourfold.data.turns import Message
from fourfold.errors import DataError

__all__ = ["Examination", "Finding", "examine", "leaks"]

# What control tokens of chat templates look like.
_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>")
_ROWS_AT_A_TIME = 1_000

Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        severity: "error": training would fail or teach something else; "warning": look at it.
        what: What was found, naming the data set.
        rows: The rows, by number.
        hint: What to do.
    """

    severity: Literal["error", "warning"]
    what: str
    rows: str | None = None
    hint: str | None = None


@dataclass
class Examination:
    """A data set, looked at row by row.

    Attributes:
        name: The data set's name.
        rows_read: Its rows.
        told_by: What they were recognised as.
        encoded: Tokens and labels of all rows that can be read, of any length; None: of none.
        numbers: The number of each encoded row in the data set, counted from 1, int64 [encoded].
        findings: What is wrong.
    """

    name: str
    rows_read: int
    told_by: str = ""
    encoded: datasets.Dataset | None = None
    numbers: Numbers = field(default_factory=lambda: np.zeros(0, np.int64))
    findings: list[Finding] = field(default_factory=list)

    @property
    def lengths(self) -> Numbers:
        """Tokens of each encoded row, int64 [encoded]."""
        return np.zeros(0, np.int64) if self.encoded is None else numbers_of(self.encoded, "num_tokens")

    @property
    def num_learned(self) -> Numbers:
        """Learned tokens of each encoded row, int64 [encoded]."""
        return np.zeros(0, np.int64) if self.encoded is None else numbers_of(self.encoded, "num_supervised_tokens")

    def error(self, what: str, rows: str | None = None, hint: str | None = None) -> None:
        self.findings.append(Finding("error", f"{self.name}: {what}", rows, hint))

    def warn(self, what: str, rows: str | None = None, hint: str | None = None) -> None:
        self.findings.append(Finding("warning", f"{self.name}: {what}", rows, hint))


def examine(
    rows: datasets.Dataset, tokenizer: Any, options: DataOptions, name: str, stop_ids: Iterable[int] = ()
) -> Examination:
    """Look at every row, at what the template makes of it, and at what would be learned.

    Args:
        rows: The rows as read. Of preferences and judged answers each answer is looked at with its prompt.
        tokenizer: The tokenizer.
        options: How rows become tokens.
        name: The data set's name.
        stop_ids: Tokens besides the tokenizer's own end at which generation stops.
    """
    found = Examination(name, len(rows))
    try:
        recognised = recognise(rows, options, name)
        found.told_by = recognised.told_by
        kind = recognised.row_format.kind
        check_tokenizer(tokenizer, kind=kind)
        good, numbers = _readable(recognised, found)
        if len(numbers) == 0:
            return found
        if kind in ("preference", "judged"):
            good, numbers = _conversations(good, recognised.row_format.name, numbers)
            recognised = RecognisedRows(good, ROW_FORMATS["messages"], found.told_by)
        else:
            recognised = RecognisedRows(good, recognised.row_format, found.told_by)
        found.encoded = encode(recognised, tokenizer, options, name)
    except DataError as error:
        found.findings.append(Finding("error", error.what, hint=_rest(error)))
        return found
    found.numbers = numbers[numbers_of(found.encoded, "row_number") - 1]
    if recognised.row_format.kind == "conversation":
        first = recognised.rows[int(found.encoded[0]["row_number"]) - 1]
        messages = recognised.row_format.to_messages(first)
        _look_at_template(found, messages, tokenizer, {tokenizer.eos_token_id, *stop_ids}, options)
    _look_at_lengths(found, options)
    _look_at_duplicates(found)
    return found


def _rest(error: DataError) -> str:
    return "; ".join(str(error).splitlines()[1:]).replace("  ", " ").strip()


def _readable(recognised: RecognisedRows, found: Examination) -> tuple[datasets.Dataset, Numbers]:
    """The rows that can be parsed, and their numbers; the others become a finding for each kind of fault."""
    faults: dict[str, list[int]] = {}
    examples: dict[str, str] = {}
    number = 0
    good = []
    for batch in recognised.rows.iter(_ROWS_AT_A_TIME):
        for values in zip(*batch.values(), strict=True):
            number += 1
            try:
                recognised.row_format.parse(dict(zip(batch, values, strict=True)))
                good.append(number)
            except DataError as error:
                faults.setdefault(error.what, []).append(number)
                examples.setdefault(error.what, _rest(error))
    for what, its_rows in faults.items():
        found.error(f"{len(its_rows):,} rows cannot be read: {what}", named(its_rows), examples[what])
    numbers = np.asarray(good, np.int64)
    return (recognised.rows.select(numbers - 1) if faults else recognised.rows), numbers


def _conversations(rows: datasets.Dataset, format_name: str, numbers: Numbers) -> tuple[datasets.Dataset, Numbers]:
    """Each answer of a comparison with its prompt, as a conversation; and the number of its row."""
    row_format = ROW_FORMATS[format_name]
    answers = ("chosen", "rejected") if row_format.kind == "preference" else ("completion",)

    def flatten(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        parsed = [
            row_format.parse(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)
        ]
        return {"messages": [[*one["prompt"], *one[answer]] for one in parsed for answer in answers]}

    return rows.map(flatten, batched=True, remove_columns=rows.column_names), numbers.repeat(len(answers))


def _look_at_template(
    found: Examination, messages: list[Message], tokenizer: Any, stop_ids: set[int], options: DataOptions
) -> None:
    assert found.encoded is not None
    added = tokenizer.added_tokens_decoder
    ends: Counter[int] = Counter()
    unended: list[int] = []
    twice: list[int] = []
    for number, input_ids, labels in _token_rows(found):
        learned = [token for token, label in zip(input_ids, labels, strict=True) if label != IGNORE_INDEX]
        while learned and not tokenizer.decode([learned[-1]]).strip():
            learned.pop()
        if not learned:
            continue
        ends[learned[-1]] += 1
        if learned[-1] not in added:
            unended.append(number)
        if len(input_ids) > 1 and input_ids[0] == input_ids[1] == tokenizer.bos_token_id is not None:
            twice.append(number)
    if unended:
        found.error(
            f"{len(unended):,} answers do not end with a special token, so the model would not learn to stop",
            named(unended),
            "take a chat template that ends each turn with one",
        )
    for token, count in ends.items():
        if token in added and token not in stop_ids:
            found.warn(
                f"{count:,} answers end with {tokenizer.decode([token])!r}, and generation stops at "
                f"{tokenizer.eos_token!r} alone",
                hint="set that token as eos_token of the tokenizer, or the eos_token_id of the generation config",
            )
    if twice:
        found.warn(f"{len(twice):,} rows begin with two BOS tokens", named(twice), "take one out of the chat template")
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    vocabulary = tokenizer.get_vocab()
    said = " ".join(message["content"] for message in messages)
    unknown = sorted({token for token in _CONTROL_TOKEN.findall(text) if token not in vocabulary and token not in said})
    if unknown:
        found.warn(
            f"the chat template writes {', '.join(unknown)}, and the tokenizer has no such tokens",
            hint="the template seems to be another model's: set the key chat_template to one for this tokenizer",
        )
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    if not options.train_on_prompt and not text.startswith(prompt):
        found.warn(
            f"generation would begin after {prompt[-40:]!r}, and the answers in the data do not",
            hint="the template opens a thought that the rows do not have: choose one without, or add thoughts to rows",
        )


def _token_rows(found: Examination) -> Iterator[tuple[int, list[int], list[int]]]:
    assert found.encoded is not None
    place = 0
    for batch in found.encoded.select_columns(["input_ids", "labels"]).iter(_ROWS_AT_A_TIME):
        for input_ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            yield int(found.numbers[place]), input_ids, labels
            place += 1


def _look_at_lengths(found: Examination, options: DataOptions) -> None:
    lengths, learned = found.lengths, found.num_learned
    overlong = found.numbers[lengths > options.max_length].tolist()
    done = {"drop": "would be dropped", "truncate": "would be cut", "error": "stop the run"}[options.overlong]
    if overlong:
        say = found.error if options.overlong == "error" or len(overlong) == len(lengths) else found.warn
        say(
            f"{len(overlong):,} rows above max_length = {options.max_length} tokens {done}",
            named(overlong),
            f"the longest has {lengths.max()} tokens: raise max_length, or accept it",
        )
    masked = found.numbers[learned == 0].tolist()
    if masked:
        say = found.error if len(masked) == len(lengths) else found.warn
        say(
            f"{len(masked):,} rows have no learned token (all labels are masked)",
            named(masked),
            "check the chat template, and that answers are there",
        )
    if options.overlong == "truncate" and overlong:
        assert found.encoded is not None
        cut = [
            number
            for number, _, labels in _token_rows(found)
            if len(labels) > options.max_length
            and all(label == IGNORE_INDEX for label in labels[1 : options.max_length])
        ]
        if cut:
            found.warn(f"{len(cut):,} rows lose every learned token when they are cut", named(cut), "raise max_length")


def _look_at_duplicates(found: Examination) -> None:
    first: dict[bytes, int] = {}
    again = []
    for number, key, _ in _keys(found):
        # Pieces of one document may be alike.
        if first.setdefault(key, number) != number:
            again.append(number)
    if again:
        found.warn(
            f"{len(again):,} rows stand there more than once", named(again), "take them out, unless they are meant"
        )


def _keys(found: Examination) -> Iterator[tuple[int, bytes, bytes | None]]:
    """Number, key of all tokens, and key of those before the first learned one (None: there are none)."""
    for number, input_ids, labels in _token_rows(found):
        start = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        yield number, _key(input_ids), _key(input_ids[:start]) if start else None


def _key(tokens: list[int]) -> bytes:
    return hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def leaks(
    train: list[Examination],
    held_out: list[Examination],
    is_held_out: Callable[[Examination, int], bool] | None = None,
) -> list[Finding]:
    """Held-out rows that are trained on: an error; held-out prompts that are, with another answer: a warning.

    Args:
        train: The data sets that are trained on.
        held_out: Those that are not; the same ones where a part of them is held out.
        is_held_out: Whether a row, by its number, belongs to that part; None: no part is held out.
    """
    rows: set[bytes] = set()
    prompts: set[bytes | None] = set()
    for one in train:
        for number, key, prompt in _keys(one):
            if is_held_out is None or not is_held_out(one, number):
                rows.add(key)
                prompts.add(prompt)
    findings = []
    for one in held_out:
        same, alike = [], []
        for number, key, prompt in _keys(one):
            if is_held_out is not None and not is_held_out(one, number):
                continue
            if key in rows:
                same.append(number)
            elif prompt is not None and prompt in prompts:
                alike.append(number)
        share = f"of {len(one.numbers):,}"
        if same:
            what = f"{one.name}: {len(same):,} {share} held-out rows are trained on, too"
            findings.append(Finding("error", what, named(same), "take them out of the training rows"))
        if alike:
            what = f"{one.name}: {len(alike):,} {share} held-out prompts are trained on with another answer"
            findings.append(Finding("warning", what, named(alike), "keep rows of one prompt on one side"))
    return findings
