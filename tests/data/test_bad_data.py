"""Whatever is wrong with data is said with what, where, what is allowed and what to do."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fourfold.data import DataOptions, load_rows, prepare
from fourfold.data.sources import DataSource
from fourfold.data.stream import RowStream
from fourfold.errors import DataError


def asked(said: Any, role: str = "user", answer: Any = "b") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": said}, {"role": "assistant", "content": answer}]}


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


GOOD = asked("a")
PAIR = {"prompt": "a", "completion": "b"}
IMAGE = {"type": "image", "image": "cat.png"}
# What and where, what was found, what is allowed, what to do.
BAD: dict[str, tuple[bytes, str, str, str, str]] = {
    "rows of two formats": (
        lines(GOOD, PAIR),
        "rows of several formats",
        "messages: rows 1; prompt_completion: rows 2",
        "one format",
        "a data set of each",
    ),
    "a text where turns are wanted": (
        lines(GOOD, {"messages": "a"}),
        "row 2: key 'messages': no turns",
        "'a'",
        '"role": ..., "content"',
        "correct the row",
    ),
    "a number where a text is wanted": (
        lines(PAIR, {"prompt": "a", "completion": 3}),
        "row 2: key 'completion': no text",
        "3",
        "a string",
        "correct the row",
    ),
    "broken JSON": (
        lines(PAIR, PAIR, b'{"prompt": \n', PAIR),
        "line 3: not JSON",
        '{"prompt":',
        "one JSON",
        "the line",
    ),
    "Latin-1": (lines(PAIR, b'{"prompt": "b\xe4h"}\n'), "line 2: not UTF-8", "byte 0xe4 at 48", "UTF-8", "iconv"),
    "UTF-16": (lines(PAIR).decode().encode("utf-16"), "line 1: not UTF-8", "byte 0xff at 0", "UTF-8", "write it anew"),
    "an unknown role": (
        lines(GOOD, asked("a", role="critic")),
        "row 2: turn 1, key 'role': unknown role",
        "'critic'",
        "system, user, assistant, tool",
        "correct the row",
    ),
    "an empty answer": (
        lines(GOOD, asked("a", answer=" \n")),
        "row 2: turn 2, key 'content': no text",
        r"' \n'",
        "not empty",
        "take it out",
    ),
    "no answer": (
        lines(GOOD, {"messages": [{"role": "user", "content": "a"}]}),
        "row 2: key 'role': the last turn is not the assistant's",
        "['user']",
        "ends with an answer",
        "correct the row",
    ),
    "a picture among the parts": (
        lines(asked([IMAGE, {"type": "text", "text": "a"}], answer=[{"type": "text", "text": "b"}])),
        "row 1: turn 1, key 'content': a text model sees no part of type 'image'",
        "cat.png",
        '"type": "text"',
        "take such rows out",
    ),
    "a column of pictures": (
        lines({**PAIR, "images": []}, {**PAIR, "images": ["cat.png"]}),
        "row 2: key 'images': a text model sees no images",
        "cat.png",
        "rows of text",
        "leave such rows out",
    ),
}


def read(path: Path, tokenizer: Any, streamed: bool) -> None:
    if streamed:
        list(RowStream([DataSource(str(path))], tokenizer, DataOptions()))
    else:
        prepare(load_rows(str(path)), tokenizer, DataOptions(), str(path))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_with_place_and_remedy(
    tiny_tokenizer: Any, tmp_path: Path, case: str, streamed: bool
) -> None:
    content, what, found, allowed, remedy = BAD[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as fault:
        read(path, tiny_tokenizer, streamed)
    said = str(fault.value)
    if streamed and case == "rows of two formats":
        # Which row has which, is not known before they are read.
        what, found = "the columns fit several row formats", "messages, prompt, completion"
        allowed, remedy = "messages: messages", "set row_format"
    assert "rows.jsonl" in said
    parts = [re.escape(part) for part in (what, found, allowed, remedy)]
    assert re.search(rf"{parts[0]}.*\n  found: .*{parts[1]}.*\n  allowed: .*{parts[2]}.*\n  to do: .*{parts[3]}", said)


def test_a_role_that_the_template_refuses_is_told_with_its_row(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(GOOD, {"messages": [{"role": "system", "content": "s"}, *GOOD["messages"]]}))
    with pytest.raises(DataError) as fault:
        prepare(load_rows(str(path)), tokenizer, DataOptions(), str(path))
    said = r"rows\.jsonl, row 2: the chat template refuses(.|\n)*no system role; roles \['system', 'user', 'assist"
    said += r"(.|\n)*allowed: +roles that the template knows(.|\n)*to do: .*chat_template"
    assert re.search(said, str(fault.value))
