from __future__ import annotations

import math
from pathlib import Path

import pytest
import tiny
import torch
from transformers import TrainerCallback

from fourfold.errors import TrainingError

pytestmark = pytest.mark.gpu


class Poison(TrainerCallback):
    """Spoils the model from a step on, and mends it before the next."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        weight = model.get_base_model().model.norm.weight.data
        if state.global_step + 1 == self.step:
            self.kept, weight[0] = weight[0].clone(), math.nan
        elif state.global_step == self.step:
            weight[0] = self.kept


@pytest.mark.parametrize(
    ("optim", "last"),
    [
        *(("adamw", False), ("adamw_8bit", False), ("adamw_8bit", True), ("adamw_torch", True)),
        *(("paged_adamw_8bit", False), ("adafactor", False)),
    ],
)
def test_bad_step_is_noticed_before_anything_is_saved_after_it(tmp_path: Path, optim: str, last: bool) -> None:
    trainer = tiny.trainer(
        tmp_path,
        callbacks=(Poison(5),),
        optim=optim,
        max_steps=5 if last else 8,
        logging_steps=100,
        save_strategy="steps",
        save_steps=2,
        use_cpu=False,
    )
    with pytest.raises(TrainingError, match=r"not finite at step 5(.|\n)*rows \d(.|\n)*checkpoint-4"):
        trainer.train()
    assert not (tmp_path / "checkpoint-6").exists()
    assert all(torch.isfinite(value).all() for value in tiny.adapter_weights(trainer.model).values())


def test_resumed_8_bit_run_has_the_losses_of_the_uninterrupted_one(tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None) -> dict[int, float]:
        trainer = tiny.trainer(
            folder,
            tiny.peft_model(r=64),
            optim="adamw_8bit",
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            use_cpu=False,
        )
        trainer.train(resume_from_checkpoint=resume)
        return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}

    whole = run(tmp_path / "whole", None)
    assert run(tmp_path / "resumed", tmp_path / "whole" / "checkpoint-3") == pytest.approx(whole, rel=1e-5)
