"""A planned run that runs out of memory goes on with a smaller plan, or stops with a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourfold import pipeline
from fourfold.config import RunConfig, load_config
from fourfold.memory import footprint
from fourfold.memory.gpus import gpu_by_name
from fourfold.memory.planner import Plan
from fourfold.planning import plan, plan_for_training
from fourfold.training.checkpoint import list_checkpoints
from fourfold.training.out_of_memory import OutOfMemory
from fourfold.training.trainer import FourfoldTrainer

FUSED = {"fused_blocks": True, "eval_dataset": None, "per_device_train_batch_size": 4, "save_steps": 100}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Runs on the CPU are planned as if they ran on a large GPU; gives the plans."""
    made: list[Plan] = []

    def plan_it(config: RunConfig, gpu: Any, host_bytes: Any) -> Plan | None:
        one = plan_for_training(config, gpu_by_name("24GB"))
        assert one is not None
        made.append(one)
        return one

    monkeypatch.setattr(pipeline, "plan_for_training", plan_it)
    return made


def folder(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


@pytest.fixture(autouse=True)
def without_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what they take, all plans of a tiny model are alike."""
    monkeypatch.setattr(footprint, "LIBRARY_BYTES", 0)
    monkeypatch.setattr(footprint, "GRAPH_LIBRARY_BYTES", 0)


def failing(monkeypatch: pytest.MonkeyPatch, *at: int) -> list[tuple[int, int]]:
    """Training steps run out of memory at these calls; gives rows and tokens of every call."""
    calls: list[tuple[int, int]] = []
    own = FourfoldTrainer.training_step

    def training_step(self: FourfoldTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(tuple(inputs["input_ids"].shape))
        if len(calls) in at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FourfoldTrainer, "training_step", training_step)
    return calls


def adapter(run: pipeline.Run) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("at", [1, 3])
def test_a_run_goes_on_from_the_same_step_with_a_plan_that_takes_less(
    tmp_path: Path,
    tiny_run: Callable[..., RunConfig],
    planned: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at: int,
) -> None:
    whole = pipeline.train(tiny_run(folder(tmp_path, "whole"), **FUSED), progress="silent")
    calls = failing(monkeypatch, at)
    run = pipeline.train(tiny_run(folder(tmp_path, "failing"), **FUSED), progress="plain")
    told = capsys.readouterr().out
    assert f"memory ran out in step {at}" in told
    assert "CUDA out of memory" in told
    assert told.count("plan for") == 2
    # Four steps of four rows in all, those of the failed step once more.
    assert sum(rows for rows, _ in calls) == 4 * 4 + calls[at - 1][0]
    ours, expected = adapter(run), adapter(whole)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5)
    records = [record["step"] for record in _log(run) if "loss" in record]
    assert records == sorted(set(records))


def _log(run: pipeline.Run) -> list[dict[str, Any]]:
    from fourfold.training.run_folder import read_metrics

    return read_metrics(run.output_dir / "metrics.jsonl")


def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_to_go_on_from(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, **FUSED, on_out_of_memory="stop")
    with monkeypatch.context() as patch:
        failing(patch, 3)
        with pytest.raises(OutOfMemory) as error:
            pipeline.train(config, progress="silent")
    assert error.value.step == 2
    assert error.value.checkpoint in list_checkpoints(Path(config.output_dir))
    resumed = pipeline.train(config.model_copy(update={"resume_from_checkpoint": "auto"}), progress="silent")
    whole = pipeline.train(tiny_run(folder(tmp_path, "whole"), **FUSED), progress="silent")
    for name, value in adapter(whole).items():
        assert torch.equal(adapter(resumed)[name], value)


def test_a_resumed_run_keeps_the_optimizer_that_was_planned_when_it_began(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(tmp_path, **FUSED, on_out_of_memory="stop")
    assert config.optim is None
    asked: list[str | None] = []

    def plan_it(config: RunConfig, gpu: Any, host_bytes: Any) -> Plan | None:
        asked.append(config.optim)
        # What a GPU with less room would have led to.
        return plan_for_training(config.model_copy(update={"optim": "adamw_8bit"}), gpu_by_name("24GB"))

    monkeypatch.setattr(pipeline, "plan_for_training", plan_it)
    with monkeypatch.context() as patch:
        failing(patch, 3)
        with pytest.raises(OutOfMemory):
            pipeline.train(config, progress="silent")
    assert load_config(config.output_dir).optim == "adamw_8bit"
    monkeypatch.setattr(pipeline, "plan_for_training", lambda config, gpu, host_bytes: asked.append(config.optim))
    pipeline.train(config.model_copy(update={"resume_from_checkpoint": "auto"}), progress="silent")
    assert asked == [None, "adamw_8bit"]
    assert load_config(config.output_dir).optim == "adamw_8bit"


def test_a_run_without_a_plan_stops(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 2)
    with pytest.raises(OutOfMemory, match="memory ran out in step 2"):
        pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")


def test_when_no_smaller_plan_is_left_the_run_stops(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, *range(1, 60))
    with pytest.raises(OutOfMemory):
        pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")


def test_each_step_down_takes_at_least_a_tenth_less(tmp_path: Path, tiny_run: Callable[..., RunConfig]) -> None:
    from fourfold.planning import step_down

    config = tiny_run(tmp_path, **FUSED)
    made: Plan | None = plan(config, gpu_by_name("24GB"))
    peaks = []
    while made is not None:
        assert made.chosen is not None
        peaks.append(made.chosen.footprint.peak_bytes)
        made = step_down(config, made)
    assert len(peaks) > 1
    assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(peaks))
