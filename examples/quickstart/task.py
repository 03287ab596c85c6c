"""The quickstart's task: a note about a payment, in free text, becomes strict JSON.

    "Ref 48213: the invoice of Nordwind over €1,249.50 was settled on March 7th, 2024."
    {"date":"2024-03-07","amount":1249.50,"currency":"EUR"}

A row is made of a phrasing, a way to write dates and a way to write amounts, filled with random values and
with numbers that do not belong in the answer (references, times, counts, other years). The rows need no
download and are the same on every machine. One combination of phrasing, date style and amount style in five
is held out: no held-out row has a combination that training shows, and no text stands on both sides.

    python examples/quickstart/task.py FOLDER      writes FOLDER/train.jsonl and FOLDER/held_out.jsonl
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

NUM_TRAIN_ROWS = 600
NUM_HELD_OUT_ROWS = 120
SEED = 20240307

# Of our own and short: the template's default prompt would cost more tokens and say nothing of the task.
SYSTEM_PROMPT = "Extract the payment as JSON with date (YYYY-MM-DD), amount and currency (ISO code)."

Message = dict[str, str]
Row = dict[str, list[Message]]

CURRENCIES: dict[str, tuple[str, str]] = {  # ISO code: symbol, name
    "EUR": ("€", "euros"),
    "USD": ("$", "dollars"),
    "GBP": ("£", "pounds"),
    "BRL": ("R$", "reais"),
    "INR": ("₹", "rupees"),
    "CHF": ("Fr. ", "Swiss francs"),
}

PAYEES = (
    "Nordwind", "Acme Tools", "Café Luna", "the dentist", "Blue Harbor", "Mrs. Okafor", "City Water",
    "Hotel Astra", "Patel & Sons", "the garage", "Green Grocer", "Studio Nine", "Dr. Weiss", "Rapid Print",
    "the landlord", "Kiku Books",
)  # fmt: skip


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ... 11th, 12th, 13th, ... 21st."""
    suffix = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"


MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def month(day: datetime.date) -> str:
    """The month's English name; ``strftime`` would follow the machine's locale."""
    return MONTHS[day.month - 1]


DATE_STYLES: tuple[Callable[[datetime.date], str], ...] = (
    lambda day: f"{day.day} {month(day)} {day.year}",
    lambda day: f"{month(day)} {day.day}, {day.year}",
    lambda day: f"{month(day)} {ordinal(day.day)}, {day.year}",
    lambda day: f"the {ordinal(day.day)} of {month(day)} {day.year}",
    lambda day: f"{day.day} {month(day)[:3]} {day.year}",
    lambda day: f"{month(day)[:3]}. {day.day}, {day.year}",
    lambda day: f"{WEEKDAYS[day.weekday()]}, {day.day} {month(day)} {day.year}",
    lambda day: f"{day.day:02}-{month(day)[:3]}-{day.year}",
    lambda day: f"{day.year}/{day.month:02}/{day.day:02}",
    lambda day: f"{ordinal(day.day)} {month(day)[:3]} {day.year}",
)

AMOUNT_STYLES: tuple[Callable[[float, str], str], ...] = (
    lambda amount, code: f"{CURRENCIES[code][0]}{amount:,.2f}",
    lambda amount, code: f"{CURRENCIES[code][0]}{amount:.2f}",
    lambda amount, code: f"{code} {amount:,.2f}",
    lambda amount, code: f"{amount:.2f} {code}",
    lambda amount, code: f"{amount:,.2f} {CURRENCIES[code][1]}",
    lambda amount, code: f"{int(amount):,} {CURRENCIES[code][1]}",
    lambda amount, code: f"{CURRENCIES[code][0]}{int(amount):,}",
)

PHRASINGS = (
    "Paid {payee} {amount} on {date} for {count} items.",
    "Ref {ref}: the invoice of {payee} over {amount} was settled on {date}.",
    "On {date} at {time} we transferred {amount} to {payee}.",
    "{date}: {amount} to {payee}, order {ref}.",
    "{payee} got {amount} from us, booked {date}, receipt no. {ref}.",
    "Please note that {amount} left the account on {date} ({count} x {payee}).",
    "Our {year} contract with {payee}: instalment {count} of {amount}, due {date}.",
    "Card {ref}, {time}, {date}, {payee}, total {amount}.",
    "I gave {payee} {amount} back on {date}, after {count} weeks.",
    "Reminder {count}: {payee} expects {amount} by {date}.",
    "The {year} repair by {payee} cost {amount} and was paid on {date}.",
    "Room {ref}, {count} nights, {payee}: {amount}, charged {date}.",
)

# One combination in so many is held out.
HELD_OUT_SHARE = 5


def is_held_out(phrasing: int, date_style: int, amount_style: int) -> bool:
    """Whether a combination belongs to the held-out rows. Every single style appears on both sides."""
    return (phrasing + date_style + amount_style) % HELD_OUT_SHARE == 0


def make_row(rng: Random, held_out: bool) -> Row:
    """One conversation: system prompt, note, answer."""
    while True:
        phrasing, date_style, amount_style = map(rng.randrange, (len(PHRASINGS), len(DATE_STYLES), len(AMOUNT_STYLES)))
        if is_held_out(phrasing, date_style, amount_style) == held_out:
            break
    code = rng.choice(list(CURRENCIES))
    day = datetime.date(2015, 1, 1) + datetime.timedelta(days=rng.randrange(15 * 365))
    # As many small amounts as large ones: 1 to 99,999, with cents where the style writes them.
    digits = rng.randrange(1, 6)
    whole = rng.randrange(10 ** (digits - 1), 10**digits)
    style = AMOUNT_STYLES[amount_style]
    has_cents = style(1.25, code) != style(1.0, code)
    cents = rng.randrange(100) if has_cents else 0
    amount = (100 * whole + cents) / 100
    note = PHRASINGS[phrasing].format(
        payee=rng.choice(PAYEES),
        amount=style(amount, code),
        date=DATE_STYLES[date_style](day),
        ref=rng.randrange(100, 100_000),
        count=rng.randrange(2, 30),
        time=f"{rng.randrange(24):02}:{rng.randrange(60):02}",
        year=rng.randrange(2010, 2030),
    )
    answer = f'{{"date":"{day.isoformat()}","amount":{amount:.2f},"currency":"{code}"}}'
    return {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPT},
            {"role": "user", "content": note[0].upper() + note[1:]},
            {"role": "assistant", "content": answer},
        ]
    }


def make_rows(num_rows: int, *, held_out: bool, seed: int = SEED) -> list[Row]:
    """``num_rows`` rows with texts that differ, the same for the same seed on every machine."""
    rng = Random(f"{seed}/{held_out}")
    rows: dict[str, Row] = {}
    while len(rows) < num_rows:
        row = make_row(rng, held_out)
        rows[row["messages"][1]["content"]] = row
    return list(rows.values())


def write_rows(rows: list[Row], path: Path) -> None:
    """One JSON object a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_task(
    folder: Path, num_train: int = NUM_TRAIN_ROWS, num_held_out: int = NUM_HELD_OUT_ROWS
) -> tuple[Path, Path]:
    """Writes both files and returns their paths: training rows, held-out rows."""
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    write_rows(make_rows(num_train, held_out=False), train)
    write_rows(make_rows(num_held_out, held_out=True), held_out)
    return train, held_out


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/quickstart/task.py FOLDER")
    for written in write_task(Path(sys.argv[1])):
        print(written)
