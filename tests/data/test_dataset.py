from __future__ import annotations

from copy import deepcopy
from typing import Any

import datasets
import pytest

from fourfold.data import DataOptions, encode_conversation, prepare
from fourfold.errors import ConfigError, DataError


def rows_of(answers: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"prompt": "Say it", "completion": answer} for answer in answers])


def conversation(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": answer}]


def num_tokens(tokenizer: Any, answer: str) -> int:
    return len(encode_conversation(conversation(answer), tokenizer).input_ids)


LONG = "0123456789" * 30


def test_prepared_rows_hold_tokens_labels_and_turns(tiny_tokenizer: Any) -> None:
    prepared = prepare(rows_of(["one", "two"]), tiny_tokenizer, DataOptions(), "rows.jsonl")
    assert prepared.dataset.column_names == ["input_ids", "labels", "messages"]
    for row, answer in zip(prepared.dataset, ["one", "two"], strict=True):
        expected = encode_conversation(conversation(answer), tiny_tokenizer)
        assert (row["input_ids"], row["labels"]) == (expected.input_ids, expected.labels)
        assert row["messages"] == conversation(answer)
    report = prepared.report
    assert (report.rows_read, report.rows_kept, report.rows_overlong) == (2, 2, 0)
    assert report.num_tokens == sum(len(row["input_ids"]) for row in prepared.dataset)
    assert report.num_supervised_tokens == sum(label != -100 for row in prepared.dataset for label in row["labels"])
    assert "2 of 2 rows" in report.lines()[0]


@pytest.mark.parametrize("swapped", [False, True])
def test_columns_of_other_names_are_mapped(tiny_tokenizer: Any, swapped: bool) -> None:
    row = {"question": "Say it", "answer": "one", "id": 7}
    if swapped:
        row["prompt"] = "not this one"
    options = DataOptions(columns={"prompt": "question", "completion": "answer"})
    prepared = prepare(datasets.Dataset.from_list([row]), tiny_tokenizer, options, "gsm8k")
    assert prepared.dataset[0]["messages"] == conversation("one")


def test_overlong_rows_are_dropped_and_reported_with_their_numbers(tiny_tokenizer: Any) -> None:
    prepared = prepare(rows_of(["one", LONG, "two", LONG]), tiny_tokenizer, DataOptions(max_length=64), "rows")
    assert [row["messages"][-1]["content"] for row in prepared.dataset] == ["one", "two"]
    report = prepared.report
    assert (report.rows_read, report.rows_kept, report.rows_overlong) == (4, 2, 2)
    assert report.first_overlong == [2, 4]
    assert report.longest == num_tokens(tiny_tokenizer, LONG)
    assert any("2 rows above 64 tokens were dropped: rows 2, 4" in line for line in report.lines())


def test_overlong_rows_are_truncated_only_when_asked(tiny_tokenizer: Any) -> None:
    options = DataOptions(max_length=64, overlong="truncate")
    prepared = prepare(rows_of(["one", LONG]), tiny_tokenizer, options, "rows")
    expected = encode_conversation(conversation(LONG), tiny_tokenizer)
    assert prepared.dataset[1]["input_ids"] == expected.input_ids[:64]
    assert prepared.dataset[1]["labels"] == expected.labels[:64]
    assert any("truncated: rows 2" in line for line in prepared.report.lines())


def test_overlong_rows_are_an_error_when_asked(tiny_tokenizer: Any) -> None:
    options = DataOptions(max_length=64, overlong="error")
    with pytest.raises(DataError, match=r"data set rows: 1 of 2 rows are longer(.|\n)*rows 2"):
        prepare(rows_of(["one", LONG]), tiny_tokenizer, options, "rows")
    assert len(prepare(rows_of(["one"]), tiny_tokenizer, options, "rows").dataset) == 1


def test_only_overlong_rows_are_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="every row is longer than max_length = 64"):
        prepare(rows_of([LONG, LONG]), tiny_tokenizer, DataOptions(max_length=64), "rows")


def test_rows_with_nothing_to_learn_are_dropped_and_reported(tiny_tokenizer: Any) -> None:
    prompt = tiny_tokenizer.apply_chat_template(conversation("one")[:1], add_generation_prompt=True, return_dict=True)
    options = DataOptions(max_length=len(prompt["input_ids"]), overlong="truncate")
    with pytest.raises(DataError, match="all labels are masked"):
        prepare(rows_of(["one", "two"]), tiny_tokenizer, options, "rows")

    rows = datasets.Dataset.from_list([{"prompt": LONG, "completion": "one"}, {"prompt": "a", "completion": "one"}])
    prepared = prepare(rows, tiny_tokenizer, DataOptions(max_length=64, overlong="truncate"), "rows")
    assert [row["messages"][0]["content"] for row in prepared.dataset] == ["a"]
    assert (prepared.report.rows_unlearned, prepared.report.first_unlearned) == (1, [1])
    assert any("1 rows with nothing to learn" in line for line in prepared.report.lines())


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_bad_row_is_named_with_its_number_and_key(tiny_tokenizer: Any, num_proc: int | None) -> None:
    rows = rows_of(["one", "two", "", "four"])
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: key 'completion': no text"):
        prepare(rows, tiny_tokenizer, DataOptions(num_proc=num_proc), "rows.jsonl")


def test_a_template_that_refuses_a_row_is_named_with_the_row(tiny_tokenizer: Any) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[-1]['content'] == 'two' %}{{ raise_exception('no two') }}{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(DataError, match=r"row 2: the chat template refuses(.|\n)*no two"):
        prepare(rows_of(["one", "two"]), tokenizer, DataOptions(), "rows")


def test_an_empty_data_set_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="data set rows is empty"):
        prepare(rows_of(["one"]).select([]), tiny_tokenizer, DataOptions(), "rows")


def test_unfit_columns_are_refused_with_the_data_sets_name(tiny_tokenizer: Any) -> None:
    rows = datasets.Dataset.from_list([{"question": "Say it", "answer": "one"}])
    with pytest.raises(DataError, match="data set gsm8k: the columns fit no row format"):
        prepare(rows, tiny_tokenizer, DataOptions(), "gsm8k")
    with pytest.raises(DataError, match="'alpaca' needs column instruction, output"):
        prepare(rows, tiny_tokenizer, DataOptions(row_format="alpaca"), "gsm8k")


def test_packing_loses_no_token_and_is_reported(tiny_tokenizer: Any) -> None:
    answers = ["one", "two", "three four five", "six"]
    plain = prepare(rows_of(answers), tiny_tokenizer, DataOptions(), "rows")
    packed = prepare(rows_of(answers), tiny_tokenizer, DataOptions(max_length=96, packing=True), "rows")
    assert packed.dataset.column_names == ["input_ids", "labels", "seq_lengths"]
    assert len(packed.dataset) < len(answers)
    assert packed.report.rows_packed == len(packed.dataset)
    assert sum(map(sum, packed.dataset["seq_lengths"])) == plain.report.num_tokens
    assert any("packed into" in line for line in packed.report.lines())


@pytest.mark.parametrize(
    "wrong",
    [{"max_length": 1}, {"overlong": "cut"}, {"row_format": "shareGPT"}, {"num_proc": 0}],
)
def test_options_that_are_not_allowed_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"key {next(iter(wrong))}"):
        DataOptions(**wrong)
