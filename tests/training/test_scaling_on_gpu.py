"""fp16 training on a GPU: on the generic path and in fused blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.training.run_folder import read_metrics

pytestmark = pytest.mark.gpu


def losses(log_history: list[dict[str, float]]) -> list[float]:
    return [log["loss"] for log in log_history if "loss" in log]


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "adamw_torch"])
def test_fp16_learns_as_fp32_does(tmp_path: Path, optim: str) -> None:
    found = {}
    for name, dtype in (("float16", torch.float16), ("float32", torch.float32)):
        options = {"compute_dtype": name, "use_cpu": False, "max_steps": 12, "optim": optim}
        trainer = tiny.trainer(tmp_path / name, tiny.peft_model(dtype), **options)
        trainer.train()
        found[name] = losses(trainer.state.log_history)
        assert (trainer.accelerator.scaler is not None) == (name == "float16")
    # The first steps may be left out until the scale fits.
    assert found["float16"][0] == pytest.approx(found["float32"][0], rel=5e-3)
    assert found["float16"][-1] < found["float16"][0]


def test_a_step_that_overflows_is_left_out_and_the_scale_halves(tmp_path: Path) -> None:
    # Two dozen steps until the scale fits; in fp32 the loss begins to fall after eight.
    options = {"compute_dtype": "float16", "use_cpu": False, "max_steps": 60}
    trainer = tiny.trainer(tmp_path, tiny.peft_model(torch.float16), **options)
    trainer.accelerator.scaler.load_state_dict(trainer.accelerator.scaler.state_dict() | {"scale": 2.0**40})
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["skipped_steps"] > 0
    assert logs[-1]["loss_scale"] == 2.0 ** (40 - logs[-1]["skipped_steps"])
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_in_fp16_saves_and_is_measured_as_one_in_fp32_is(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, fused: bool
) -> None:
    keys = {"fused_blocks": fused, "max_steps": 20, "logging_steps": 5, "save_steps": 20}
    exact = pipeline.train(tiny_run(tmp_path, **keys | {"fused_blocks": False, "output_dir": str(tmp_path / "exact")}))
    run = pipeline.train(tiny_run(tmp_path, **keys, device="cuda:0", bnb_4bit_compute_dtype="float16"))
    first = read_metrics(run.output_dir / "metrics.jsonl")[0]
    assert run.metrics["eval_loss"] == pytest.approx(exact.metrics["eval_loss"], rel=2e-3)
    assert run.metrics["eval_loss"] < 0.9 * first["loss"]
    assert "loss_scale" in first
