from __future__ import annotations

from typing import Any

import pytest

from fourfold.data import ROW_FORMATS, detect_row_format
from fourfold.data.row_formats import map_columns
from fourfold.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("messages", {"messages": [USER, ANSWER]}, [USER, ANSWER]),
        ("messages", {"messages": [{**USER, "name": None}, ANSWER]}, [USER, ANSWER]),
        ("alpaca", {"instruction": "Hi", "output": "Hello"}, [USER, ANSWER]),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello", "system": None}, [USER, ANSWER]),
        (
            "alpaca",
            {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief"},
            [
                {"role": "system", "content": "Be brief"},
                {"role": "user", "content": "Add\n\n1 2"},
                {"role": "assistant", "content": "3"},
            ],
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, [USER, ANSWER]),
        ("prompt_completion", {"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
    ],
)
def test_rows_become_conversations(name: str, row: dict[str, Any], expected: list[dict[str, str]]) -> None:
    assert ROW_FORMATS[name].to_messages(row) == expected


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("messages", {"messages": None}, "key 'messages': no turns"),
        ("messages", {"messages": []}, "key 'messages': no turns"),
        ("messages", {"messages": ["Hi"]}, "turn 1: not a message"),
        (
            "messages",
            {"messages": [USER, {"role": "bot", "content": "x"}]},
            "turn 2, key 'role': unknown role",
        ),
        ("messages", {"messages": [USER, {"role": "assistant", "content": " "}]}, "turn 2, key 'content'"),
        ("messages", {"messages": [USER, {"role": "assistant", "content": None}]}, "turn 2, key 'content'"),
        ("messages", {"messages": [USER, ANSWER, USER]}, "last turn is not the assistant's"),
        ("messages", {"messages": [USER]}, "last turn is not the assistant's"),
        ("messages", {"messages": [ANSWER]}, "assistant speaks first"),
        ("messages", {"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "turn 2: keys that would be lost"),
        ("alpaca", {"instruction": "Hi", "output": ""}, "key 'output': no text"),
        ("alpaca", {"instruction": "Hi", "output": 3}, "key 'output': no text"),
        ("alpaca", {"instruction": "Hi", "output": "x", "input": 3}, "key 'input': no text"),
        ("alpaca", {"output": "x"}, "key 'instruction': no text"),
        ("prompt_completion", {"prompt": "Hi", "completion": None}, "key 'completion': no text"),
    ],
)
def test_a_bad_row_is_refused_with_its_key(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ROW_FORMATS[name].to_messages(row)


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_every_format_is_found_by_its_own_columns(name: str) -> None:
    row_format = ROW_FORMATS[name]
    assert detect_row_format([*row_format.required, *row_format.optional, "id"]) is row_format


def test_columns_of_no_format_are_listed_beside_what_each_format_needs() -> None:
    with pytest.raises(DataError) as caught:
        detect_row_format(["question", "answer"])
    assert "question, answer" in str(caught.value)
    for name in ROW_FORMATS:
        assert name in str(caught.value)


def test_columns_of_two_formats_ask_for_a_choice() -> None:
    with pytest.raises(DataError, match="several row formats"):
        detect_row_format(["messages", "prompt", "completion"])


def test_a_column_mapping_is_checked() -> None:
    columns = ["question", "answer"]
    assert map_columns(columns, {"prompt": "question", "completion": "answer"}) == {
        "question": "prompt",
        "answer": "completion",
    }
    with pytest.raises(DataError, match="key that no row format has"):
        map_columns(columns, {"question": "prompt"})
    with pytest.raises(DataError, match="column that is not there"):
        map_columns(columns, {"prompt": "query"})
    with pytest.raises(DataError, match="one column to two keys"):
        map_columns(columns, {"prompt": "answer", "completion": "answer"})
