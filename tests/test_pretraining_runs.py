"""Runs that learn raw text, over a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold import pipeline
from fourfold.errors import DataError
from fourfold.inputs import read_data, read_tokenizer

TEXTS = [f"Anna paid {number} euros for the ticket, and Ben paid the rest of it." for number in range(24)]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Any]:
    for name, rows in (("texts", TEXTS), ("held_out_texts", TEXTS[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return {
        name: str(tmp_path / f"{file}.jsonl")
        for name, file in (("train_dataset", "texts"), ("eval_dataset", "held_out_texts"))
    }


def test_every_token_of_a_text_and_its_end_is_a_label(tiny_run, tmp_path: Path, texts: dict[str, Any]) -> None:
    config = tiny_run(tmp_path, **texts, method="pretrain")
    tokenizer = read_tokenizer(config)
    train_data, _ = read_data(config, tokenizer)
    for text, row in zip(TEXTS, train_data.dataset, strict=True):
        assert row["input_ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert row["labels"] == row["input_ids"]


@pytest.mark.parametrize("keys", [{}, {"packing": True}], ids=["rows", "packed"])
def test_a_run_learns_texts_and_is_measured_again(
    tiny_run, tmp_path: Path, texts: dict[str, Any], keys: dict[str, Any]
) -> None:
    config = tiny_run(tmp_path, **texts, method="pretrain", **keys)
    before = pipeline.evaluate(config, progress="silent")["eval_loss"]
    run = pipeline.train(config, progress="silent")
    assert run.metrics["eval_loss"] < before
    assert pipeline.evaluate(config, progress="silent")["eval_loss"] == pytest.approx(
        run.metrics["eval_loss"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "sft", "eval_generate_rows": 2}, "held-out rows are plain text"),
        ({"method": "dpo"}, "such rows are for method: pretrain or sft"),
    ],
)
def test_texts_answer_nothing_and_are_not_compared(
    tiny_run, tmp_path: Path, texts: dict[str, Any], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        pipeline.train(tiny_run(tmp_path, **texts, **keys), progress="silent")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_conversations_are_no_raw_text(tiny_run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'text' needs column text"):
        pipeline.train(tiny_run(tmp_path, method="pretrain"), progress="silent")
