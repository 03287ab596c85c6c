from __future__ import annotations

from pathlib import Path

import pytest
import tiny

from fourfold.training.run_folder import MetricsCallback, read_metrics


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_resuming_after_the_last_step_makes_no_step_more(tmp_path: Path, strategy: str) -> None:
    # A constant learning rate: at the end of any other course a step more would not move the weights.
    options = {
        "max_steps": 3,
        "lr_scheduler_type": "constant",
        "save_strategy": strategy,
        "save_steps": 3,
        "eval_strategy": strategy,
        "eval_steps": 3,
        "eval_dataset": tiny.rows(4),
    }
    first = tiny.trainer(tmp_path, **options)
    first.train()
    again = tiny.trainer(tmp_path, callbacks=(MetricsCallback(tmp_path),), **options)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 3
    weights = tiny.adapter_weights(first.model)
    assert all(value.equal(weights[name]) for name, value in tiny.adapter_weights(again.model).items())
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
    assert [record["step"] for record in records if "eval_loss" in record] == [3]
    assert records[-1]["train_loss"] == pytest.approx(sum(r["loss"] for r in records if "loss" in r) / 3)
