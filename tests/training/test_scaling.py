"""fp16's loss scaling. accelerate offers it on GPUs only; its parts work on a CPU, and are put together here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from fourfold.errors import TrainingError
from fourfold.training.options import TrainingOptions, to_sft_config
from fourfold.training.trainer import FourfoldTrainer


def scaled(folder: Path, scale: float, **options: Any) -> FourfoldTrainer:
    trainer = tiny.trainer(folder, max_steps=4, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.accelerator.scaler = trainer._guard._scaler = scaler
    return trainer


class Overflow(TrainerCallback):
    """Gradients beyond every number, in these steps."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.hook = steps, None
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        parameter = next(one for one in model.parameters() if one.requires_grad)
        if self.hook is not None:
            self.hook.remove()
        factor = math.inf if state.global_step + 1 in self.steps else 1.0
        self.hook = parameter.register_hook(lambda grad: grad * factor)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(tiny.adapter_weights(model))


@pytest.mark.parametrize("optim", ["adamw", "adamw_torch"])
def test_a_scaled_run_is_the_run_that_is_not(tmp_path: Path, optim: str) -> None:
    # On a GPU the Trainer's own clipping takes the scale off first; here it knows of none.
    options: dict[str, Any] = {"optim": optim, "max_grad_norm": 1.0 if optim == "adamw" else 0.0}
    plain = tiny.trainer(tmp_path / "a", max_steps=4, **options)
    half = scaled(tmp_path / "b", 2.0**16, **options)
    plain.train()
    half.train()
    expected, found = tiny.adapter_weights(plain.model), tiny.adapter_weights(half.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    last = [log for log in half.state.log_history if "loss" in log][-1]
    assert (last["loss_scale"], last["skipped_steps"]) == (2.0**16, 0)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adamw_torch"])
def test_a_step_that_overflows_is_left_out_and_the_scale_halves(tmp_path: Path, optim: str) -> None:
    overflow = Overflow(1, 3)
    trainer = scaled(tmp_path, 64.0, callbacks=(overflow,), optim=optim)
    before = tiny.adapter_weights(trainer.model)
    trainer.train()
    first, second, third, fourth = overflow.weights
    for old, new, moves in ((before, first, 0), (first, second, 1), (second, third, 0), (third, fourth, 1)):
        assert any(not torch.equal(old[name], new[name]) for name in old) == bool(moves)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["loss_scale"] for log in logs] == [32.0, 32.0, 16.0, 16.0]
    assert logs[-1]["skipped_steps"] == 2


def test_a_run_ends_where_no_scale_helps(tmp_path: Path) -> None:
    trainer = scaled(tmp_path, 2.0, callbacks=(Overflow(1, 2, 3, 4),))
    with pytest.raises(TrainingError, match=r"overflow fp16 at step 2(.|\n)*scale 0.5, 2 steps left out"):
        trainer.train()


def test_a_loss_that_is_not_finite_still_ends_the_run(tmp_path: Path) -> None:
    trainer = scaled(tmp_path, 64.0)
    trainer.model.get_base_model().model.norm.weight.data[0] = math.inf
    with pytest.raises(TrainingError, match="not finite at step 1"):
        trainer.train()


def test_a_resumed_run_goes_on_at_its_scale(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    whole = scaled(tmp_path, 64.0, callbacks=(Overflow(2),), **options)
    whole.train()
    record = json.loads((tmp_path / "checkpoint-2" / "optimizer.json").read_text())
    assert record["scaler"]["scale"] == 32.0
    resumed = scaled(tmp_path, 2.0**16, **options)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert resumed.accelerator.scaler.get_scale() == whole.accelerator.scaler.get_scale() == 32.0
    expected, found = tiny.adapter_weights(whole.model), tiny.adapter_weights(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_fp16_is_the_trainers_and_what_is_trained_is_held_in_fp32(tmp_path: Path) -> None:
    options = TrainingOptions(output_dir=tmp_path, compute_dtype="float16", use_cpu=True)
    from fourfold.training.options import COMPUTE_DTYPES, keep_in_fp32

    model = tiny.peft_model(torch.float16, modules_to_save=["lm_head"])
    keep_in_fp32(model, COMPUTE_DTYPES[options.compute_dtype])
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert {one.dtype for one in model.parameters() if not one.requires_grad} == {torch.float16}
    assert to_sft_config(TrainingOptions(output_dir=tmp_path, compute_dtype="float32", use_cpu=True)).fp16 is False
