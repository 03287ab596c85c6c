"""sharegpt, plain text, preferences and judged answers; what rows are recognised as."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import datasets
import pytest
import trl

from fourfold.data import (
    ROW_FORMATS,
    DataOptions,
    detect_row_format,
    encode_conversation,
    parse_rows,
    prepare,
    recognise,
)
from fourfold.data.templates import encode_documents
from fourfold.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "No"}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}


def of(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def test_sharegpt_turns_become_messages() -> None:
    said = [("system", "Be brief"), ("human", "Hi"), ("gpt", "Call"), ("observation", "4"), ("gpt", "Hello")]
    turns = [{"from": who, "value": what, "weight": None} for who, what in said]
    roles = ["system", "user", "assistant", "tool", "assistant"]
    expected = [{"role": role, "content": what} for role, (_, what) in zip(roles, said, strict=True)]
    assert ROW_FORMATS["sharegpt"].to_messages({"conversations": turns}) == expected
    assert ROW_FORMATS["sharegpt"].to_messages({"conversations": turns[1:], "system": "Be brief"}) == expected
    assert ROW_FORMATS["sharegpt"].to_messages({"conversations": [USER, ANSWER]}) == [USER, ANSWER]


def test_content_in_parts_of_text_is_joined() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert ROW_FORMATS["messages"].to_messages({"messages": [{**USER, "content": parts}, ANSWER]}) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, PAIR),
        (PAIR, PAIR),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, PAIR),
        ({"chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, PAIR),
        ({"prompt": "Hi", "chosen": ANSWER, "rejected": OTHER}, PAIR),
    ],
)
def test_preferences_are_prompt_chosen_and_rejected_in_turns(row: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ROW_FORMATS["preference"].parse(row) == expected


@pytest.mark.parametrize("turns", [3, 5])
def test_an_implicit_prompt_is_the_one_that_trl_extracts(turns: int) -> None:
    talk = [USER, ANSWER, {**USER, "content": "Sure?"}, OTHER, USER][:turns]
    row = {"chosen": [*talk, {**ANSWER, "content": "A"}], "rejected": [*talk, {**ANSWER, "content": "B"}]}
    assert ROW_FORMATS["preference"].parse(row) == trl.data_utils.extract_prompt(row)


@pytest.mark.parametrize(("label", "expected"), [(True, True), (0, False), ("True", True), ("false", False)])
def test_judged_answers_are_prompt_completion_and_label(label: object, expected: bool) -> None:
    row = {"prompt": "Hi", "completion": "Hello", "label": label}
    assert ROW_FORMATS["kto"].parse(row) == {"prompt": [USER], "completion": [ANSWER], "label": expected}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "turn 1, key 'from': unknown role"),
        ("sharegpt", {"conversations": [{"from": "human", "value": ""}]}, "turn 1, key 'value': no text"),
        ("messages", {"messages": [USER, ANSWER], "images": ["a.png"]}, "key 'images': a text model sees no images"),
        ("messages", {"messages": [{**USER, "content": [{"type": "image"}]}]}, "turn 1, key 'content': .*'image'"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ("preference", {"prompt": "Hi", "chosen": "a", "rejected": ""}, "key 'rejected': no text"),
        ("preference", {"chosen": "a", "rejected": "b"}, "key 'prompt': there is none"),
        ("preference", {"prompt": "Hi", "chosen": [USER], "rejected": [OTHER]}, "key 'chosen': .*last turn is not"),
        ("kto", {"prompt": "Hi", "completion": "a", "label": "good"}, "key 'label': neither true nor false"),
        ("kto", {"prompt": "Hi", "completion": "a", "label": 2}, "key 'label': neither true nor false"),
        ("text", {"text": 3}, "key 'text': no text"),
        ("text", {"text": "a", "image": b"png"}, "key 'image': a text model sees no images"),
    ],
)
def test_a_bad_row_is_refused_with_its_key(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ROW_FORMATS[name].parse(row)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["prompt", "completion", "label"], "kto"),
        (["instruction", "output", "text"], "alpaca"),
        (["text", "label"], "text"),
        (["chosen", "rejected"], "preference"),
    ],
)
def test_columns_that_ask_for_most_decide(columns: list[str], name: str) -> None:
    assert detect_row_format(columns).name == name


def test_what_was_recognised_is_said_with_what_by_and_what_is_not_read() -> None:
    rows = of([{"q": "Hi", "completion": "Hello", "id": 1}])
    found = recognise(rows, DataOptions(columns={"prompt": "q"}), "rows")
    assert found.told_by == "rows of prompt_completion, told by columns q, completion; not read: id"


def test_rows_of_several_formats_are_refused_with_their_numbers() -> None:
    one = {"prompt": "a", "completion": "b", "instruction": None, "output": None}
    rows = of([one, one, {"prompt": None, "completion": None, "instruction": "a", "output": "b"}])
    with pytest.raises(DataError, match=r"several formats(.|\n)*alpaca: rows 3; prompt_completion: rows 1, 2"):
        recognise(rows, DataOptions(), "rows")
    # One format has a value nowhere: it is no format of these rows.
    rows = of([one])
    assert recognise(rows, DataOptions(), "rows").row_format.name == "prompt_completion"


def test_preferences_are_parsed_into_the_columns_that_trl_takes_and_not_learned_one_by_one(tiny_tokenizer: Any) -> None:
    rows = of([{"prompt": "Hi", "chosen": "Hello", "rejected": "No", "score": 3}])
    parsed = parse_rows(rows, DataOptions(), "pairs").rows
    assert parsed.to_list() == [PAIR]
    assert trl.is_conversational(parsed[0])
    with pytest.raises(DataError, match=r"preference rows are compared(.|\n)*method: dpo, orpo or reward"):
        prepare(rows, tiny_tokenizer, DataOptions(), "pairs")
    with pytest.raises(DataError, match="pairs, row 2: key 'chosen'"):
        parse_rows(of([PAIR, {**PAIR, "chosen": []}]), DataOptions(), "pairs")


def test_of_plain_text_every_token_is_learned_once_and_none_is_lost(tiny_tokenizer: Any) -> None:
    texts = ["The capital of France is Paris. " * 9, "", "Short."]
    rows = of([{"text": text} for text in texts])
    prepared = prepare(rows, tiny_tokenizer, DataOptions(max_length=16), "texts")
    assert prepared.dataset.column_names == ["input_ids", "labels"]
    learned = [token for row in prepared.dataset for token in row["labels"][1:]]
    whole = [[*tiny_tokenizer(text)["input_ids"], tiny_tokenizer.eos_token_id] for text in texts if text]
    assert learned == [token for tokens in whole for token in tokens[1:]]
    assert max(map(len, prepared.dataset["input_ids"])) == 16
    report = prepared.report
    assert (report.rows_read, report.rows_empty, report.rows_unlearned) == (3, 1, 0)
    assert any("1 empty rows were left out" in line for line in report.lines())


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 7])
def test_no_piece_of_a_document_is_without_a_label(tiny_tokenizer: Any, num_tokens: int) -> None:
    [pieces] = encode_documents(["1" * num_tokens], tiny_tokenizer, 4)
    assert sum(len(piece.labels) - 1 for piece in pieces) == num_tokens
    assert all(2 <= len(piece.labels) <= 4 for piece in pieces)


def test_plain_text_needs_an_end_token_and_no_chat_template(tiny_tokenizer: Any) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = None
    rows = of([{"text": "Paris."}])
    assert len(prepare(rows, tokenizer, DataOptions(), "texts").dataset) == 1
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no eos token"):
        prepare(rows, tokenizer, DataOptions(), "texts")


@pytest.mark.parametrize("changed", ["template", "rows", "train_on_prompt", "none"])
def test_tokenized_rows_are_cached_by_content(
    tiny_tokenizer: Any, changed: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    rows = of([{"prompt": "Hi", "completion": "Hello"}, {"prompt": "Hi", "completion": "No"}])
    prepare(rows, tiny_tokenizer, DataOptions(), "first")
    before = set((tmp_path / "fourfold").iterdir())
    tokenizer, again, options = deepcopy(tiny_tokenizer), of(rows.to_list()), DataOptions(max_length=99)
    # What a call leaves in a tokenizer is no part of its content.
    tokenizer("x", truncation=True, max_length=3)
    if changed == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    elif changed == "rows":
        again = of([*rows.to_list()[:1], {"prompt": "Hi", "completion": "Yes"}])
    elif changed == "train_on_prompt":
        options = DataOptions(train_on_prompt=True)
    prepared = prepare(again, tokenizer, options, "second")
    new = set((tmp_path / "fourfold").iterdir()) - before
    assert len(new) == (0 if changed == "none" else 1)
    for row, given in zip(prepared.dataset, again, strict=True):
        messages = ROW_FORMATS["prompt_completion"].to_messages(given)
        expected = encode_conversation(messages, tokenizer, options.train_on_prompt)
        assert (row["input_ids"], row["labels"]) == (expected.input_ids, expected.labels)


def test_how_many_processes_tokenize_changes_neither_rows_nor_cache(
    tiny_tokenizer: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    given = [{"prompt": f"Say {number}", "completion": "x" * (number % 30 + 1)} for number in range(60)]
    several = prepare(of(given), tiny_tokenizer, DataOptions(packing=True, max_length=64, num_proc=3), "rows").dataset
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "fourfold").iterdir()}
    one = prepare(of(given), tiny_tokenizer, DataOptions(packing=True, max_length=64), "rows").dataset
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "fourfold").iterdir()} == files
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "other")
    anew = prepare(of(given), tiny_tokenizer, DataOptions(packing=True, max_length=64), "rows").dataset
    assert several.to_list() == one.to_list() == anew.to_list()


@pytest.mark.parametrize(
    ("num_rows", "num_proc", "cores", "expected"),
    [
        (39_999, None, 4, None),
        (40_000, None, 4, 2),
        (1_000_000, None, 4, 4),
        (10_000_000, None, 96, 8),
        (1_000_000, None, 1, None),
        (10, 3, 4, 3),
        (1_000_000, 1, 4, None),
    ],
)
def test_a_data_set_that_is_large_enough_is_tokenized_by_a_process_a_core(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, num_proc: int | None, cores: int, expected: int | None
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert DataOptions(num_proc=num_proc).workers(num_rows) == expected
