"""A run that is stopped in the middle of an epoch and goes on is the one that was not stopped, to the last bit.

Its losses, what is logged between two checkpoints, its weights, the best step, what early stopping has counted, and the
samples. The runs are of the features that draw numbers, count, or keep an order of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset

from fourfold.data import Collator, pack
from fourfold.inference import GenerationOptions
from fourfold.training.best import BestOptions, best_of
from fourfold.training.building import build_trainer
from fourfold.training.methods import MethodOptions
from fourfold.training.options import TrainingOptions
from fourfold.training.out_of_memory import OutOfMemory
from fourfold.training.parameter_groups import GroupOptions, LrGroup
from fourfold.training.preference import build_preference_trainer
from fourfold.training.samples import Prompt, SampleCallback
from fourfold.training.trainer import FourfoldTrainer

# Of a log, what tells of the machine and not of the run.
MEASURED = ("_runtime", "_per_second", "memory_", "total_flos")
GROUPS = GroupOptions(loraplus_lr_ratio=4.0, lr_groups=(LrGroup(("layers.1.self_attn",), 3e-3, "late"),))
STOPPING = {"best": BestOptions(load_at_end=True, patience=4, threshold=0.01), "eval_steps": 1}
SETS = {"near": tiny.rows(3, seed=8), "far": tiny.rows(2, seed=9)}


def pairs(count: int = 12) -> Dataset:
    rows = []
    for good, bad in zip(tiny.rows(count), tiny.rows(count, seed=5), strict=True):
        row: dict[str, Any] = {}
        for side, answer in (("chosen", good), ("rejected", bad)):
            start = answer["labels"].count(-100)
            prompt = good["input_ids"][: good["labels"].count(-100)]
            row[f"{side}_input_ids"] = prompt + answer["input_ids"][start:]
            row[f"{side}_labels"] = [-100] * len(prompt) + answer["labels"][start:]
        rows.append(row)
    return Dataset.from_list(rows)


def marked(count: int = 12) -> Dataset:
    return tiny.rows(count).add_column("label", [number % 3 > 0 for number in range(count)])


CASES: dict[str, dict[str, Any]] = {
    "dropout": {},
    "packed": {"rows": pack(tiny.rows(30), 40), "width": 48},
    "by length": {"group_by_length": True},
    "noise": {"neftune_noise_alpha": 5.0},
    "groups": {"groups": GROUPS, "optim": "adamw_8bit"},
    "groups of torch": {"groups": GROUPS, "optim": "adamw_torch"},
    "all weights": {"model": tiny.base_model, "optim": "adafactor"},
    "best, stopping, sets": {**STOPPING, "eval_dataset": SETS, "metric": "eval_near_loss"},
    "dpo": {"method": "dpo", "rows": pairs(), "eval_dataset": pairs(3)},
    "dpo, by length": {"method": "dpo", "rows": pairs(), "group_by_length": True},
    "orpo": {"method": "orpo", "rows": pairs(), "neftune_noise_alpha": None},
    "kto": {"method": "kto", "rows": marked(), "eval_dataset": marked(3), **STOPPING},
}


def made(folder: Path, **case: Any) -> FourfoldTrainer:
    """Three steps of four rows to an epoch; a log for every three, so that none falls on a checkpoint in an epoch."""
    method, rows = case.pop("method", None), case.pop("rows", tiny.rows(12))
    model = case.pop("model", lambda: tiny.peft_model(dropout=0.0 if method else 0.1, r=64))()
    collator, eval_dataset = Collator(0, width=case.pop("width", None)), case.pop("eval_dataset", None)
    if "metric" in case:
        case["best"] = BestOptions(load_at_end=True, patience=4, threshold=0.01, metric=case.pop("metric"))
    options: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"learning_rate": 1e-2, "logging_steps": 3, "save_strategy": "steps", "save_steps": 1, "use_cpu": True}
    options |= {"compute_dtype": "float32", "save_total_limit": None, "eval_steps": 2}
    options |= {"eval_strategy": "no" if eval_dataset is None else "steps"} | case
    shared = (model, tiny.tokenizer(), rows, eval_dataset, collator, TrainingOptions(output_dir=folder, **options))
    trainer = build_preference_trainer(*shared, MethodOptions(method=method)) if method else build_trainer(*shared)
    prompts = [Prompt("w1 w2", "w1 w2")]
    trainer.add_callback(SampleCallback(prompts, tiny.tokenizer(), GenerationOptions(max_new_tokens=3), folder, 2))
    return trainer


def outcome(trainer: FourfoldTrainer, resume: Path | None = None) -> dict[str, Any]:
    trainer.train(resume_from_checkpoint=resume)
    history = [
        {key: value for key, value in entry.items() if not any(part in key for part in MEASURED)}
        for entry in trainer.state.log_history
    ]
    samples = (Path(trainer.args.output_dir) / "samples.jsonl").read_text()
    state = trainer.state
    return {
        "history": [entry for entry in history if "train_loss" not in entry],
        "samples": [json.loads(line) for line in samples.splitlines()],
        "best": (best_of(trainer), state.best_metric, state.best_global_step, state.global_step),
    }


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_goes_on_is_the_one_that_was_not_stopped(tmp_path: Path, name: str) -> None:
    whole = made(tmp_path / "whole", **CASES[name])
    wanted = outcome(whole)
    assert len(wanted["samples"]) == wanted["best"][-1] // 2
    weights = tiny.adapter_weights(whole.model)
    # In the middle of the second epoch, and between the logs of steps 3 and 6. The folder is as a crash would leave it:
    # later samples and checkpoints are there already.
    again = made(tmp_path / "whole", **CASES[name])
    assert outcome(again, tmp_path / "whole" / "checkpoint-5") == wanted
    left = tiny.adapter_weights(again.model)
    assert all(torch.equal(left[key], value) for key, value in weights.items())


def test_a_step_that_runs_out_of_memory_is_not_counted_twice(tmp_path: Path) -> None:
    case = {"model": lambda: tiny.peft_model(r=64), "save_steps": 100}  # dropout would have drawn for that step
    wanted = outcome(made(tmp_path / "whole", **case))
    trainer = made(tmp_path / "cut", **case)
    step, calls = trainer.training_step, []

    def failing(*args: Any) -> torch.Tensor:
        calls.append(step(*args))
        if len(calls) == 10:  # the second microbatch of step 5
            raise torch.OutOfMemoryError("CUDA out of memory")
        return calls[-1]

    trainer.training_step = failing  # type: ignore[method-assign]
    with pytest.raises(OutOfMemory) as error:
        trainer.train()
    assert error.value.step == 4
    assert outcome(made(tmp_path / "cut", **case), error.value.checkpoint) == wanted


def test_rows_of_like_length_come_in_another_order_each_epoch(tmp_path: Path) -> None:
    trainer = made(tmp_path, group_by_length=True)
    sampler = trainer._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(12))
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    # Its longest row first, so that what does not fit fails at once.
    assert lengths[orders[0][0]] == max(lengths)
