from __future__ import annotations

import datetime
import hashlib
import json
from collections import Counter
from pathlib import Path

from quickstart import task

TRAIN = task.make_rows(task.NUM_TRAIN_ROWS, held_out=False)
HELD_OUT = task.make_rows(task.NUM_HELD_OUT_ROWS, held_out=True)

TEXTS_SHA256 = "ca1f4945dd57ebea28ac00674bc2711daeb8257ed202d0d76de739a26c1b28bf"


def note(row: task.Row) -> str:
    return row["messages"][1]["content"]


def answer(row: task.Row) -> dict[str, object]:
    return json.loads(row["messages"][2]["content"])


def test_rows_are_the_same_on_every_machine() -> None:
    text = "".join(note(row) + row["messages"][2]["content"] for row in TRAIN + HELD_OUT)
    assert hashlib.sha256(text.encode()).hexdigest() == TEXTS_SHA256


def test_another_seed_gives_other_rows() -> None:
    assert task.make_rows(5, held_out=False, seed=1) != TRAIN[:5]


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert task.make_rows(7, held_out=False) == TRAIN[:7]


def test_no_text_stands_on_both_sides_or_twice() -> None:
    train, held_out = map(note, TRAIN), map(note, HELD_OUT)
    counts = Counter([*train, *held_out])
    assert len(counts) == len(TRAIN) + len(HELD_OUT)


def test_every_style_is_trained_and_held_out_while_combinations_are_not_shared() -> None:
    combinations = [
        (phrasing, date_style, amount_style)
        for phrasing in range(len(task.PHRASINGS))
        for date_style in range(len(task.DATE_STYLES))
        for amount_style in range(len(task.AMOUNT_STYLES))
    ]
    for side in (True, False):
        chosen = [c for c in combinations if task.is_held_out(*c) == side]
        for position, styles in enumerate((task.PHRASINGS, task.DATE_STYLES, task.AMOUNT_STYLES)):
            assert {c[position] for c in chosen} == set(range(len(styles)))


def test_every_answer_is_strict_json_of_what_its_note_says() -> None:
    for row in TRAIN + HELD_OUT:
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        found, text = answer(row), note(row)
        assert list(found) == ["date", "amount", "currency"]

        day = datetime.date.fromisoformat(str(found["date"]))
        assert str(day.year) in text
        assert str(day.day) in text
        assert f"{day:%b}" in text or f"/{day:%m}/" in text

        amount = float(str(found["amount"]))
        spellings = [f"{amount:.2f}", f"{amount:,.2f}"] + [f"{int(amount):,}"] * amount.is_integer()
        assert any(spelling in text for spelling in spellings)

        currency = str(found["currency"])
        assert any(spelling in text for spelling in (currency, *task.CURRENCIES[currency]))


def test_ordinals() -> None:
    numbers = (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 30, 31)
    expected = "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd 30th 31st"
    assert " ".join(map(task.ordinal, numbers)) == expected


def test_written_files_hold_one_row_a_line(tmp_path: Path) -> None:
    train, held_out = task.write_task(tmp_path / "task", num_train=20, num_held_out=10)
    assert [json.loads(line) for line in train.read_text("utf-8").splitlines()] == TRAIN[:20]
    assert [json.loads(line) for line in held_out.read_text("utf-8").splitlines()] == HELD_OUT[:10]
