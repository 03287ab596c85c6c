"""Runs that learn from preferences, from rows to the run folder, over a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourfold import pipeline
from fourfold.config import RunConfig, load_config
from fourfold.errors import ConfigError, DataError
from fourfold.inputs import read_data, read_tokenizer
from fourfold.memory.gpus import gpu_by_name
from fourfold.planning import kept_to, plan, plan_for_training
from fourfold.training.methods import FIGURES

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


def pair(number: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"Anna paid {number} euros."}],
        "chosen": [{"role": "assistant", "content": json.dumps({"amount": number})}],
        "rejected": [{"role": "assistant", "content": f"Anna paid for {number} items?"}],
    }


def marked(number: int) -> dict[str, Any]:
    one = pair(number)
    side = "chosen" if number % 2 else "rejected"
    return {"prompt": one["prompt"][0]["content"], "completion": one[side][0]["content"], "label": bool(number % 2)}


def write(folder: Path, row: Callable[[int], dict[str, Any]]) -> dict[str, str]:
    files = {"train_dataset": range(24), "eval_dataset": range(40, 46)}
    for name, numbers in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row(number)) + "\n" for number in numbers))
    return {name: str(folder / f"{name}.jsonl") for name in files}


def figures_of(folder: Path) -> set[str]:
    """What evaluations gave, but for their speed."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = {key.removeprefix("eval_") for record in records for key in record if key.startswith("eval_")}
    return keys - {"runtime", "samples_per_second", "steps_per_second"}


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        ({"method": "dpo", "gradient_checkpointing": True}, pair),
        ({"method": "dpo", "adapter": None, "load_in_4bit": False, "precompute_ref_log_probs": True}, pair),
        ({"method": "dpo", "adapter_weight": 0.5}, pair),
        ({"method": "orpo", "loss_type": None}, pair),
        ({"method": "kto"}, marked),
    ],
    ids=["dpo", "dpo-full", "dpo-weighed", "orpo", "kto"],
)
def test_a_run_learns_is_measured_again_and_answers(
    tiny_run, tmp_path: Path, keys: dict[str, Any], row: Callable[[int], dict[str, Any]]
) -> None:
    config = tiny_run(tmp_path, **write(tmp_path, row), **keys, max_length=96, save_steps=4)
    run = pipeline.train(config, progress="silent")
    assert load_config(run.output_dir).method == keys["method"]
    assert figures_of(run.output_dir) == set(FIGURES[keys["method"]])
    if keys["method"] == "dpo":
        assert run.metrics["eval_rewards/accuracies"] > 0.5
    measured = pipeline.evaluate(config, progress="silent")
    assert measured["eval_loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-4)
    assert "".join(pipeline.chat(str(run.output_dir), max_new_tokens=2).reply(pair(1)["prompt"])) is not None
    if config.adapter is not None:
        assert pipeline.merge(str(run.output_dir), tmp_path / "merged").difference.relative_error < 0.02


@pytest.mark.parametrize(
    ("method", "row", "said"),
    [
        ("dpo", marked, "method: kto"),
        ("kto", pair, "method: dpo, orpo or reward"),
        ("sft", pair, "method: dpo, orpo or reward"),
        ("dpo", lambda n: pair(n) | ({"chosen": pair(n)["rejected"]} if n == 3 else {}), "row 4: .* the same"),
        ("dpo", lambda n: pair(n) | ({"rejected": []} if n == 2 else {}), "row 3: key 'rejected': no turns"),
        (
            "kto",
            lambda n: marked(n) | ({"label": None} if n == 5 else {}),
            "row 6: key 'label': neither",
        ),
    ],
)
def test_rows_of_another_kind_and_bad_ones_are_named(
    tiny_run, tmp_path: Path, method: str, row: Any, said: str
) -> None:
    with pytest.raises(DataError) as error:
        pipeline.train(tiny_run(tmp_path, **write(tmp_path, row), method=method), progress="silent")
    assert re.search(said, str(error.value)), str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"method": "sft", "beta": 0.2}, "beta means nothing to method: sft"),
        ({"method": "orpo", "loss_type": "ipo"}, "loss_type means nothing to method: orpo"),
        ({"method": "kto", "loss_type": "ipo"}, "loss_type ipo is no loss of method: kto"),
        ({"method": "dpo", "loss_type": "kto"}, "loss_type kto is no loss of method: dpo"),
        ({"method": "dpo", "packing": True}, "packing means nothing to method: dpo"),
        ({"method": "dpo", "lora_dropout": 0.1}, "lora_dropout makes two answers differ"),
        ({"method": "dpo", "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights has 1 numbers"),
        ({"method": "dpo", "label_smoothing": 0.1}, "none of loss_type's losses is smoothed"),
        ({"method": "dpo", "loss_type": "exo_pair"}, "logarithm"),
        ({"method": "kto", "per_device_train_batch_size": 1}, "pairs the rows of a microbatch"),
        ({"method": "dpo", "requantize_every": 2}, "requantize_every changes the base"),
        ({"method": "pretrain", "row_format": "alpaca"}, "row_format alpaca are not what method: pretrain"),
        ({"method": "dpo", "train_dataset": [{"path": "a", "row_format": "kto"}]}, "give other rows, or method: kto"),
        ({"row_format": "preference"}, "method: dpo or orpo or reward"),
        ({"row_format": "text", "eval_dataset": "e", "eval_generate_rows": 2}, "eval_generate_rows asks for answers"),
    ],
)
def test_keys_that_mean_nothing_to_a_method_are_refused_by_name(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig(model_name_or_path="m", **keys)


@pytest.mark.parametrize("keys", [{"method": "kto", "adapter": None, "load_in_4bit": False}, {"method": "dpo"}])
def test_a_reference_that_is_not_the_base_is_refused(tiny_run, tmp_path: Path, keys: dict[str, Any]) -> None:
    config = (
        tiny_run(tmp_path, **keys, init_lora_weights="pissa") if "adapter" not in keys else tiny_run(tmp_path, **keys)
    )
    with pytest.raises(ConfigError, match="refers to"):
        pipeline.train(config, progress="silent")


def test_a_run_learns_to_score_answers_and_writes_none(tiny_run, tmp_path: Path) -> None:
    keys = {"method": "reward", "max_length": 96, "save_steps": 2, "save_total_limit": None}
    config = tiny_run(tmp_path, **write(tmp_path, pair), **keys)
    run = pipeline.train(config, progress="silent")
    assert run.metrics["eval_accuracy"] == 1.0
    assert pipeline.evaluate(config, progress="silent")["eval_loss"] == pytest.approx(
        run.metrics["eval_loss"], rel=1e-4
    )
    again = config.model_copy(
        update={
            "output_dir": str(tmp_path / "again"),
            "resume_from_checkpoint": str(run.output_dir / "checkpoint-2"),
        }
    )
    resumed = pipeline.train(again, progress="silent")
    wanted, got = (load_file(one.output_dir / "adapter" / "adapter_model.safetensors") for one in (run, resumed))
    assert any("score" in name for name in wanted)
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    for verb in (
        lambda: pipeline.chat(str(run.output_dir)),
        lambda: pipeline.merge(str(run.output_dir), tmp_path / "m"),
    ):
        with pytest.raises(ConfigError, match="gives scores"):
            verb()


@pytest.mark.parametrize(
    ("keys", "row"),
    [
        ({"method": "reward", "load_in_4bit": True}, pair),
        ({"method": "dpo", "load_in_4bit": True, "precompute_ref_log_probs": True}, pair),
        ({"method": "reward", "load_in_8bit": True}, pair),
        ({"method": "kto", "load_in_8bit": True}, marked),
    ],
    ids=["reward-requantized", "dpo-requantized", "reward-int8", "kto-int8"],
)
def test_a_base_of_another_precision_is_measured_again_alike(
    tiny_run, tmp_path: Path, keys: dict[str, Any], row: Callable[[int], dict[str, Any]]
) -> None:
    keys = keys | {"requantize_every": None if "load_in_8bit" in keys else 2, "save_total_limit": None}
    config = tiny_run(tmp_path, **write(tmp_path, row), **keys, max_length=96)
    run = pipeline.train(config, progress="silent")
    measured = pipeline.evaluate(config, progress="silent")["eval_loss"]
    assert measured == pytest.approx(run.metrics["eval_loss"], rel=1e-3)
    start = str(run.output_dir / "checkpoint-2")
    again = config.model_copy(update={"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": start})
    assert pipeline.train(again, progress="silent").metrics["eval_loss"] == pytest.approx(measured, rel=1e-3)


def test_pairs_are_mixed_by_weight_and_chosen_among_other_columns(tiny_run, tmp_path: Path) -> None:
    # As on the hub: the better conversation stands in `messages`, too.
    files = write(tmp_path, lambda n: pair(n) | {"messages": [*pair(n)["prompt"], *pair(n)["chosen"]]})
    parts = [{"path": path, "weight": weight} for path, weight in zip(files.values(), (3.0, 1.0), strict=True)]
    config = tiny_run(
        tmp_path, **(files | {"train_dataset": parts}), method="dpo", max_length=96, stopping_strategy="first_exhausted"
    )
    train_data, held_out = read_data(config, read_tokenizer(config))
    report, columns = train_data.report, train_data.dataset.column_names
    assert held_out[""].report.row_format.startswith("rows of preference, told by columns chosen, rejected")
    assert [name for name in columns if name.endswith("input_ids")] == ["chosen_input_ids", "rejected_input_ids"]
    both = [len(row["chosen_input_ids"]) + len(row["rejected_input_ids"]) for row in train_data.dataset]
    assert (report.rows_kept, report.num_tokens) == (len(both), sum(both))
    assert report.row_format.startswith("interleaved")
    as_conversations, _ = read_data(config.model_copy(update={"method": "sft"}), read_tokenizer(config))
    assert "messages" in as_conversations.dataset.column_names


def test_a_plan_counts_both_answers_of_a_pair(tiny_run, tmp_path: Path) -> None:
    keys = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "fused_blocks": False}
    of_pairs, of_rows = (
        plan(tiny_run(tmp_path, **keys, method=method, eval_dataset=None), gpu_by_name("24GB"))
        for method in ("dpo", "sft")
    )
    assert of_pairs.chosen is not None
    assert of_rows.chosen is not None
    assert of_pairs.chosen.batch * of_pairs.chosen.accumulation == 16
    assert of_rows.chosen.batch * of_rows.chosen.accumulation == 8
    config = tiny_run(tmp_path, **keys, method="dpo")
    kept = kept_to(config, plan_for_training(config, gpu_by_name("24GB")))
    assert kept.per_device_train_batch_size * kept.gradient_accumulation_steps == 8
