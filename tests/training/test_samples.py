from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from fourfold.inference import GenerationOptions, generate_replies
from fourfold.training.samples import Prompt, SampleCallback

OPTIONS = GenerationOptions(max_new_tokens=4)
TURNS = [{"role": "user", "content": "w3 w4 w5"}]
PROMPTS = [Prompt("w1 w2", "w1 w2"), Prompt(TURNS, TURNS, reference="w6")]


def run(folder: Path, sampled: bool, resume: Path | None = None, **options: Any):
    """Dropout, and checkpointing of activations: what generation could disturb."""
    every = options.pop("every", 2)
    model = tiny.peft_model(dropout=0.1)
    trainer = tiny.trainer(folder, model, **{"max_steps": 6, "gradient_checkpointing": True, **options})
    told: list[Any] = []
    if sampled:
        tell = [lambda state, answers: told.extend(answers)]
        trainer.add_callback(SampleCallback(PROMPTS, tiny.tokenizer(), OPTIONS, folder, every, tell))
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return losses, model, told


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_change_no_loss_no_weight_and_no_random_state(tmp_path: Path) -> None:
    plain, plain_model, _ = run(tmp_path / "plain", sampled=False)
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state())
    losses, model, told = run(tmp_path / "sampled", sampled=True)
    assert len(told) == 6
    assert losses == plain
    weights = tiny.adapter_weights(model)
    assert all(torch.equal(weights[name], value) for name, value in tiny.adapter_weights(plain_model).items())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.random.get_rng_state(), states[2])


def test_each_answer_is_that_of_the_model_at_its_step(tmp_path: Path) -> None:
    _, _, told = run(tmp_path / "whole", sampled=True)
    records = read(tmp_path / "whole")
    assert [set(record) for record in records] == [{"step", "prompt", "answer", "reference"}] * 6
    assert [record["step"] for record in records] == [2, 2, 4, 4, 6, 6]
    assert [record["prompt"] for record in records[:2]] == ["w1 w2", TURNS]
    assert [record["reference"] for record in records[:2]] == [None, "w6"]
    _, model, _ = run(tmp_path / "end", sampled=False)
    wanted = generate_replies(model, tiny.tokenizer(), [prompt.asked for prompt in PROMPTS], OPTIONS)
    assert [record["answer"] for record in records[4:]] == wanted
    assert [answer.answer for answer in told[4:]] == wanted


def test_a_run_that_goes_on_has_the_samples_of_one_that_was_not_stopped(tmp_path: Path) -> None:
    run(tmp_path, sampled=True, save_strategy="steps", save_steps=3)
    whole = (tmp_path / "samples.jsonl").read_text()
    run(tmp_path, sampled=True, resume=tmp_path / "checkpoint-3")
    assert (tmp_path / "samples.jsonl").read_text() == whole


def test_without_a_number_of_steps_they_come_once_with_each_evaluation(tmp_path: Path) -> None:
    sets = {"a": tiny.rows(2), "b": tiny.rows(2, seed=4)}
    run(tmp_path, sampled=True, every=None, eval_dataset=sets, eval_strategy="steps", eval_steps=3)
    assert [record["step"] for record in read(tmp_path)] == [3, 3, 6, 6]


def test_the_clock_of_the_steps_leaves_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr("fourfold.training.guard.time.perf_counter", lambda: clock["now"])

    def slow(*args: Any) -> list[str]:
        clock["now"] += 1000
        return ["", ""]

    monkeypatch.setattr("fourfold.training.samples.generate_replies", slow)
    trainer = tiny.trainer(tmp_path, max_steps=1)
    trainer.add_callback(SampleCallback(PROMPTS, tiny.tokenizer(), OPTIONS, tmp_path, 1))
    seconds: list[float] = []
    log = trainer.log
    trainer.log = lambda *args: (seconds.append(trainer._guard.seconds), log(*args))  # type: ignore[method-assign]
    trainer._guard.seconds = 1e-9
    monkeypatch.setattr(trainer._guard, "on_train_begin", lambda *args, **kwargs: None)
    trainer.train()
    assert max(seconds) < 1
