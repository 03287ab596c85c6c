"""Several sets of held-out rows in one run, over a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fourfold import pipeline
from fourfold.config import load_config
from fourfold.errors import ConfigError
from fourfold.examining import examine_data

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


def two_sets(folder: Path) -> dict[str, str]:
    rows = (folder / "held_out.jsonl").read_text().splitlines(keepends=True)
    (folder / "held_out.jsonl").write_text("".join(rows[:4]))
    (folder / "others.jsonl").write_text("".join(rows[4:]))
    return {"near": str(folder / "held_out.jsonl"), "far-off": str(folder / "others.jsonl")}


def test_each_set_is_measured_told_drawn_and_measured_again(tiny_run, tmp_path: Path, capsys) -> None:
    config = tiny_run(tmp_path).model_copy(
        update={"eval_dataset": two_sets(tmp_path), "eval_steps": 2, "eval_generate_rows": 1, "eval_max_new_tokens": 2}
    )
    run = pipeline.train(config, progress="plain")
    said = capsys.readouterr().out
    assert load_config(run.output_dir).eval_dataset == config.eval_dataset
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    card = (run.output_dir / "README.md").read_text()
    for name, rows in (("near", 4), ("far-off", 2)):
        key = f"eval_{name}_loss"
        assert [record["step"] for record in records if key in record] == [2, 4]
        assert run.metrics[key] == [record[key] for record in records if key in record][-1]
        assert f"validation loss {run.metrics[key]:.4f} ({name})" in said
        assert f"| {key} | {run.metrics[key]:.6g} |" in card
        assert f"| held-out rows ({name}) | {rows} |" in card
        assert run.metrics[f"eval_{name}_exact_match_rows"] == 1
    assert run.metrics["eval_near_loss"] != run.metrics["eval_far-off_loss"]
    assert "eval_loss" not in run.metrics
    assert [sample.expected for sample in run.samples] == ['{"amount": 0}', '{"amount": 4}']
    measured = pipeline.evaluate(config, progress="silent")
    for key in ("eval_near_loss", "eval_far-off_loss"):
        assert measured[key] == pytest.approx(run.metrics[key], rel=1e-5)


def test_the_mean_over_both_is_that_of_one_set_of_all_rows(tiny_run, tmp_path: Path) -> None:
    one = tiny_run(tmp_path)
    whole = tmp_path / "whole.jsonl"
    whole.write_bytes((tmp_path / "held_out.jsonl").read_bytes())
    parts = pipeline.evaluate(one.model_copy(update={"eval_dataset": two_sets(tmp_path)}), progress="silent")
    together = pipeline.evaluate(one.model_copy(update={"eval_dataset": str(whole)}), progress="silent")
    numbers = {name: parts[f"eval_{name}_num_tokens"] for name in ("near", "far-off")}
    mean = sum(parts[f"eval_{name}_loss"] * number for name, number in numbers.items()) / sum(numbers.values())
    assert mean == pytest.approx(together["eval_loss"], rel=1e-5)


def test_the_doctor_looks_at_all_sets(tiny_run, tmp_path: Path) -> None:
    config = tiny_run(tmp_path)
    train = Path(config.train_dataset).read_text().splitlines(keepends=True)
    (tmp_path / "leak.jsonl").write_text(train[3] + train[4].replace("euros", "pounds"))
    sets = {"fresh": str(tmp_path / "fresh.jsonl"), "leak": str(tmp_path / "leak.jsonl")}
    (tmp_path / "fresh.jsonl").write_text(train[3].replace("paid", "earned"))
    seen = examine_data(config.model_copy(update={"eval_dataset": sets}))
    assert not seen.is_sound
    assert [finding.rows for finding in seen.findings if "trained on" in finding.what] == ["rows 1"]
    assert set(seen.told_by) == {config.train_dataset, *sets.values()}


@pytest.mark.parametrize("line", ["eval_dataset: {}", "eval_dataset: {'a b': x.jsonl}", "eval_dataset: [x.jsonl]"])
def test_other_forms_are_refused_with_the_right_ones(tmp_path: Path, line: str) -> None:
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: m\n{line}\n")
    with pytest.raises(ConfigError, match=r"eval_dataset(.|\n)*a mapping of names"):
        load_config(tmp_path / "run.yaml")
