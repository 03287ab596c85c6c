"""NEFTune's noise, by the Trainer's own argument: in training alone, and gone afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import TrainerCallback

from fourfold.errors import ConfigError

ALPHA = 5.0


class Watch(TrainerCallback):
    """What the embedding gives, and what it would give without noise."""

    def __init__(self) -> None:
        self.noise: dict[bool, list[torch.Tensor]] = {True: [], False: []}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            embedding = model.get_base_model().get_input_embeddings()
            # After the Trainer's.
            embedding.register_forward_hook(self.see)

    def see(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.noise[module.training].append(output.detach() - torch.nn.functional.embedding(inputs[0], module.weight))


def losses(folder: Path, **options: Any) -> tuple[list[float], list[float]]:
    trainer = tiny.trainer(
        folder, eval_dataset=tiny.rows(2), max_steps=3, eval_strategy="steps", eval_steps=1, **options
    )
    trainer.train()
    history = trainer.state.log_history
    return tuple([entry[key] for entry in history if key in entry] for key in ("loss", "eval_loss"))


def test_the_noise_is_uniform_of_its_strength_in_training_and_none_in_evaluation(tmp_path: Path) -> None:
    watch = Watch()
    losses(tmp_path, neftune_noise_alpha=ALPHA, callbacks=(watch,))
    assert len(watch.noise[True]) == 3
    for noise in watch.noise[True]:
        bound = ALPHA / (noise.shape[1] * noise.shape[2]) ** 0.5
        assert 0.95 * bound < noise.abs().max() <= bound * 1.001
        assert noise.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert len(watch.noise[False]) >= 3
    assert all(noise.abs().max() == 0 for noise in watch.noise[False])


def test_it_changes_what_is_learned(tmp_path: Path) -> None:
    plain, noisy = losses(tmp_path / "a"), losses(tmp_path / "b", neftune_noise_alpha=ALPHA)
    assert all(abs(one - other) > 1e-4 for one, other in zip(plain[0], noisy[0], strict=True))


def test_no_noise_stays_behind_a_run_or_an_error(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if fails:
                raise ZeroDivisionError

    model = tiny.peft_model()
    hooks = model.get_base_model().get_input_embeddings()._forward_hooks
    before = len(hooks)
    for fails in (True, False):
        trainer = tiny.trainer(tmp_path, model, max_steps=1, neftune_noise_alpha=ALPHA, callbacks=(Fail(),))
        if fails:
            with pytest.raises(ZeroDivisionError):
                trainer.train()
        else:
            trainer.train()
        assert len(hooks) == before


def test_a_strength_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neftune_noise_alpha"):
        tiny.trainer(tmp_path, neftune_noise_alpha=0.0)
