from __future__ import annotations

from copy import deepcopy
from typing import Any

import datasets
import pytest

from fourfold.data import DataOptions
from fourfold.data.doctor import Examination, Finding, examine, leaks

ROWS = [{"prompt": f"Say {number}", "completion": str(number)} for number in range(4)]


def look(rows: list[dict[str, Any]], tokenizer: Any, name: str = "rows", **options: Any) -> Examination:
    return examine(datasets.Dataset.from_list(rows), tokenizer, DataOptions(**options), name)


def one_finding(examination: Examination) -> Finding:
    [finding] = examination.findings
    return finding


def test_sound_rows_have_no_finding(tiny_tokenizer: Any) -> None:
    examination = look(ROWS, tiny_tokenizer)
    assert examination.findings == []
    assert examination.lengths.tolist() == [len(row) for row in examination.encoded["input_ids"]]


def test_rows_that_cannot_be_read_are_grouped_and_the_others_keep_their_numbers(tiny_tokenizer: Any) -> None:
    rows = [ROWS[0], {**ROWS[1], "completion": " "}, ROWS[2], {**ROWS[3], "completion": ""}]
    examination = look(rows, tiny_tokenizer)
    finding = one_finding(examination)
    assert (finding.severity, finding.rows) == ("error", "rows 2, 4")
    assert "2 rows cannot be read: key 'completion': no text" in finding.what
    assert examination.numbers.tolist() == [1, 3]


def test_repeated_rows_are_named(tiny_tokenizer: Any) -> None:
    finding = one_finding(look([*ROWS, ROWS[2]], tiny_tokenizer))
    assert (finding.severity, finding.rows) == ("warning", "rows 5")


@pytest.mark.parametrize(("overlong", "severity"), [("drop", "warning"), ("error", "error")])
def test_long_rows_are_named(tiny_tokenizer: Any, overlong: str, severity: str) -> None:
    rows = [*ROWS, {"prompt": "Say", "completion": "0123456789" * 9}]
    finding = one_finding(look(rows, tiny_tokenizer, max_length=64, overlong=overlong))
    assert (finding.severity, finding.rows) == (severity, "rows 5")


def test_rows_cut_before_their_answer_are_named(tiny_tokenizer: Any) -> None:
    rows = [*ROWS, {"prompt": "0123456789" * 9, "completion": "no"}]
    found = look(rows, tiny_tokenizer, max_length=64, overlong="truncate").findings
    assert any("lose every learned token" in finding.what and finding.rows == "rows 5" for finding in found)


def test_answers_that_end_where_generation_does_not_stop_are_told(tiny_tokenizer: Any) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    finding = one_finding(look(ROWS, tokenizer))
    assert "end with '<|im_end|>', and generation stops at '<|endoftext|>'" in finding.what
    stops = examine(datasets.Dataset.from_list(ROWS), tokenizer, DataOptions(), "rows", [tiny_tokenizer.eos_token_id])
    assert stops.findings == []


@pytest.mark.parametrize(
    ("template", "train_on_prompt", "severity", "what"),
    [
        # Mistral's first template without its end token.
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", True, "error", "do not end with"),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", False, "error", "cannot be split"),
        (
            "{% for m in messages %}<|start_header_id|>{{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>{% endif %}",
            False,
            "warning",
            "writes <|start_header_id|>, and the tokenizer has no such",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|><think>{% endif %}",
            False,
            "warning",
            "generation would begin after",
        ),
    ],
)
def test_wrong_templates_are_told(
    tiny_tokenizer: Any, template: str, train_on_prompt: bool, severity: str, what: str
) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = template
    finding = one_finding(look(ROWS, tokenizer, train_on_prompt=train_on_prompt))
    assert finding.severity == severity
    assert what in finding.what


def test_a_doubled_bos_is_told(tiny_tokenizer: Any) -> None:
    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}{{ bos_token }}" + tokenizer.chat_template
    assert "4 rows begin with two BOS tokens" in one_finding(look(ROWS, tokenizer)).what


def test_preferences_are_looked_at_with_both_answers(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": f"Say {number}", "chosen": "Yes", "rejected": "No"} for number in range(2)]
    examination = look(rows, tiny_tokenizer)
    assert examination.findings == []
    assert examination.numbers.tolist() == [1, 1, 2, 2]
    assert [row[-1]["content"] for row in examination.encoded["messages"]] == ["Yes", "No", "Yes", "No"]


def test_held_out_rows_that_are_trained_on_are_an_error_and_prompts_a_warning(tiny_tokenizer: Any) -> None:
    train = look(ROWS, tiny_tokenizer)
    held_out = look([ROWS[3], {**ROWS[1], "completion": "one"}, {"prompt": "new", "completion": "x"}], tiny_tokenizer)
    found = leaks([train], [held_out])
    assert [(finding.severity, finding.rows) for finding in found] == [("error", "rows 1"), ("warning", "rows 2")]
    assert leaks([train], [look([{"prompt": "new", "completion": "x"}], tiny_tokenizer)]) == []


def test_a_held_out_part_is_compared_with_the_rest(tiny_tokenizer: Any) -> None:
    examination = look([*ROWS, ROWS[0]], tiny_tokenizer)
    assert leaks([examination], [examination], lambda _, number: number == 2) == []
    [finding] = leaks([examination], [examination], lambda _, number: number == 5)
    assert (finding.severity, finding.rows) == ("error", "rows 5")


def test_columns_of_no_format_are_a_finding(tiny_tokenizer: Any) -> None:
    finding = one_finding(look([{"a": "b"}], tiny_tokenizer))
    assert finding.severity == "error"
    assert "fit no row format" in finding.what
