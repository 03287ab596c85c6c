from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fourfold.cli import app


def run(config: Any, folder: Path, *words: str) -> Any:
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    return CliRunner().invoke(app, ["data", str(path), *words])


def test_data_shows_what_is_learned_lengths_and_that_nothing_is_wrong(tiny_run: Any, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, eval_dataset=None, packing=True)
    result = run(config, tmp_path, "--rows", "1")
    assert result.exit_code == 0, result.output
    assert '<|im_start|>assistant\n⟦{"amount": 0}<|im_end|>⟧\n' in result.output
    for said in ("row 1: ", "tokens a row", "learned: ", "padding in packed sequences: ", "told by column messages"):
        assert said in result.output
    assert "nothing wrong was found" in result.output


def test_json_has_rows_lengths_reports_and_findings(tiny_run: Any, tmp_path: Path, tiny_tokenizer: Any) -> None:
    config = tiny_run(tmp_path, eval_dataset=None)
    result = run(config, tmp_path, "--json", "--rows", "2", "--seed", "3")
    seen = json.loads(result.stdout)
    again = json.loads(run(config, tmp_path, "--json", "--rows", "2", "--seed", "3").stdout)
    assert seen == again
    assert seen["is_sound"] is True
    assert sum(seen["histogram"].values()) == 24
    rows = [json.loads(line) for line in Path(config.train_dataset).read_text().splitlines()]
    for row in seen["rows"]:
        given = rows[row["row_number"] - 1]["messages"]
        text = "".join(segment["text"] for segment in row["segments"])
        assert text == tiny_tokenizer.apply_chat_template(given, tokenize=False)
        learned = "".join(segment["text"] for segment in row["segments"] if segment["learned"])
        assert learned == given[-1]["content"] + "<|im_end|>"
    share = seen["reports"][0]["num_supervised_tokens"] / seen["reports"][0]["num_tokens"]
    assert seen["supervised_share"] == pytest.approx(share)


def test_a_validation_set_that_is_trained_on_is_an_error_with_exit_code_1(tiny_run: Any, tmp_path: Path) -> None:
    # The fixture's held-out rows are the first training rows.
    result = run(tiny_run(tmp_path), tmp_path)
    assert result.exit_code == 1
    assert "error: " in result.output
    assert "6 of 6 held-out rows are trained on, too (rows 1, 2, 3, 4, 5, ...)" in result.output


def test_a_part_that_is_held_out_of_repeated_rows_is_an_error(tiny_run: Any, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, eval_dataset=None, eval_split_fraction=0.5)
    assert run(config, tmp_path).exit_code == 0
    path = Path(config.train_dataset)
    path.write_text(path.read_text() * 2)
    assert "held-out rows are trained on, too" in run(config, tmp_path).output


def test_preferences_are_shown_though_they_are_not_learned_one_by_one(tiny_run: Any, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "Hi", "chosen": "Hello", "rejected": "No"}\n')
    config = tiny_run(tmp_path, train_dataset=str(path), eval_dataset=None)
    wrong = run(config, tmp_path)
    assert wrong.exit_code == 1
    assert "such rows are for method: dpo, orpo or reward" in wrong.output
    result = run(config.model_copy(update={"method": "dpo"}), tmp_path)
    assert result.exit_code == 0, result.output
    assert "1 of 1 rows" in result.output
    assert "⟦Hello<|im_end|>⟧" in result.output
    assert "rows of preference, told by columns chosen, rejected" in result.output


def test_a_file_that_cannot_be_read_is_the_error(tiny_run: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Hi"\n')
    result = run(tiny_run(tmp_path, train_dataset=str(path)), tmp_path)
    assert result.exit_code == 1
    assert "bad.jsonl, line 1: not JSON" in result.output
