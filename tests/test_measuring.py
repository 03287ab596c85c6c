"""What a run's log comes to, and what cannot be measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.errors import DataError
from fourfold.measuring import measure, summary


def test_the_mean_loss_of_a_run_counts_each_step_once() -> None:
    losses = [3.0, 2.0, 4.0, 1.0, 0.5]
    records = [
        {"step": 3, "loss": sum(losses[:3]) / 3},
        {"step": 3, "eval_loss": 9.0},
        {"step": 5, "loss": sum(losses[3:]) / 2},
    ]
    assert summary(records)["train_loss"] == pytest.approx(sum(losses) / 5)


def test_a_summary_has_the_last_evaluation_the_highest_memory_and_the_median_speed() -> None:
    records = [
        {"step": 1, "eval_loss": 2.0, "memory_peak_bytes": 5, "tokens_per_second": 10.0},
        {"step": 2, "eval_loss": None, "memory_peak_bytes": 7, "tokens_per_second": 90.0},
        {"step": 3, "eval_loss": 1.0, "memory_peak_bytes": 6, "tokens_per_second": 30.0},
    ]
    assert summary(records) == {"eval_loss": 1.0, "memory_peak_bytes": 7, "tokens_per_second": 30.0}
    assert summary([]) == {}


def test_a_text_that_is_not_there_is_told_with_its_key(tiny_run, tiny_tokenizer, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, perplexity_text=str(tmp_path / "none.txt"))
    with pytest.raises(DataError, match=r"none\.txt(.|\n)*perplexity_text"):
        measure(config, torch.nn.Identity(), tiny_tokenizer, {}, print, with_loss=True)
