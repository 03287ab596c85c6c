"""A planned run that runs out of memory goes on with a smaller plan, or stops with a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fourfold import limiting, pipeline, planning, run_plan
from fourfold.config import RunConfig, load_config
from fourfold.config import options as choices
from fourfold.errors import TrainingError
from fourfold.memory import footprint
from fourfold.memory.gpus import gpu_by_name
from fourfold.memory.planner import Plan
from fourfold.models.block import FusedDecoderLayer
from fourfold.models.loading import load_model
from fourfold.models.preparing import prepare
from fourfold.planning import plan, plan_for_training, step_down
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.training.checkpoint import list_checkpoints
from fourfold.training.out_of_memory import OutOfMemory
from fourfold.training.trainer import FourfoldTrainer

FUSED = {"fused_blocks": True, "eval_dataset": None, "per_device_train_batch_size": 4, "save_steps": 100}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """Runs on the CPU are planned as if they ran on a large GPU; gives the plans."""
    made: list[Plan] = []

    def plan_it(config: RunConfig, *_: Any) -> Plan | None:
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


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")


def failing(monkeypatch: pytest.MonkeyPatch, *at: int, error: RuntimeError = OUT_OF_MEMORY) -> list[tuple[int, int]]:
    """Training steps run out of memory at these calls; gives rows and tokens of every call."""
    calls: list[tuple[int, int]] = []
    own = FourfoldTrainer.training_step

    def training_step(self: FourfoldTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(tuple(inputs["input_ids"].shape))
        if len(calls) in at:
            raise type(error)(*error.args)
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


def test_layers_on_the_generic_path_step_down_as_well(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointed: list[bool] = []
    own = FourfoldTrainer.training_step

    def training_step(self: FourfoldTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        layers = [module for module in self.model.modules() if isinstance(module, FusedDecoderLayer)]
        assert all(layer.recompute is None for layer in layers)
        checkpointed.append(any(layer._checkpoints for layer in layers))
        if len(checkpointed) == 3:
            raise type(OUT_OF_MEMORY)(*OUT_OF_MEMORY.args)
        return own(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FourfoldTrainer, "training_step", training_step)
    smaller: list[Plan] = []

    def note(*args: Any) -> Plan | None:
        made = step_down(*args)
        assert made is not None
        smaller.append(made)
        return made

    monkeypatch.setattr(pipeline, "step_down", note)
    run = pipeline.train(tiny_run(tmp_path, **FUSED, use_dora=True, cuda_graphs=False), progress="silent")
    before, after = (made.chosen for made in (planned[0], smaller[0]))
    assert before is not None
    assert after is not None
    assert checkpointed == [before.recompute == "full"] * 3 + [after.recompute == "full"] * (len(checkpointed) - 3)
    assert after.footprint.peak_bytes < before.footprint.peak_bytes
    assert _log(run)[-1]["step"] == 4


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

    def plan_it(config: RunConfig, *_: Any) -> Plan | None:
        asked.append(config.optim)
        # What a GPU with less room would have led to.
        return plan_for_training(config.model_copy(update={"optim": "adamw_8bit"}), gpu_by_name("24GB"))

    monkeypatch.setattr(pipeline, "plan_for_training", plan_it)
    with monkeypatch.context() as patch:
        failing(patch, 3)
        with pytest.raises(OutOfMemory):
            pipeline.train(config, progress="silent")
    assert load_config(config.output_dir).optim == "adamw_8bit"
    monkeypatch.setattr(pipeline, "plan_for_training", lambda config, *_: asked.append(config.optim))
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
    config = tiny_run(tmp_path, **FUSED)
    made: Plan | None = plan(config, gpu_by_name("24GB"))
    peaks = []
    while made is not None:
        assert made.chosen is not None
        peaks.append(made.chosen.footprint.peak_bytes)
        made = step_down(config, made)
    assert len(peaks) > 1
    assert all(later <= 0.9 * earlier for earlier, later in itertools.pairwise(peaks))


def test_a_step_down_fits_what_others_leave(tmp_path: Path, tiny_run: Callable[..., RunConfig]) -> None:
    config = tiny_run(tmp_path, **FUSED)
    gpu = gpu_by_name("24GB")
    first = plan(config, gpu)
    assert first.chosen is not None
    smaller = step_down(config, first)
    assert smaller is not None
    assert smaller.chosen is not None
    left = smaller.chosen.footprint.peak_bytes - 1
    fitting = step_down(config, first, gpu.with_usable(left))
    assert fitting is not None
    assert fitting.chosen is not None
    assert fitting.chosen.footprint.peak_bytes <= left
    assert step_down(config, first, gpu.with_usable(1000)) is None


def test_the_failed_attempts_optimizer_is_gone_when_the_next_begins(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []
    own = FourfoldTrainer.create_optimizer

    def create_optimizer(self: FourfoldTrainer, *args: Any, **kwargs: Any) -> Any:
        alive.append(sum(one() is not None for one in made))
        optimizer = own(self, *args, **kwargs)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(FourfoldTrainer, "create_optimizer", create_optimizer)
    failing(monkeypatch, 3)
    pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")
    assert alive == [0, 0]


@pytest.mark.parametrize(("stage", "said"), [("load_model", "the model was loaded"), ("measure", "was measured")])
def test_memory_that_runs_out_beside_training_is_told_with_what_to_do(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, stage: str, said: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB\nmore")

    monkeypatch.setattr(pipeline, stage, fail)
    with pytest.raises(TrainingError, match=rf"memory ran out while .*{said}\n.*Tried to allocate 7 GiB\n.*to do:"):
        pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")
    assert (tmp_path / "run" / "adapter").is_dir() is (stage == "measure")


def test_a_model_that_is_not_what_was_planned_is_refused_before_the_first_step(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = run_plan.model_shape

    def one_layer_more(config: Any, *args: Any) -> Any:
        return own(type(config)(**config.to_dict() | {"num_hidden_layers": 3}), *args)

    config = tiny_run(tmp_path, **FUSED)
    monkeypatch.setattr(run_plan, "model_shape", one_layer_more)
    model = load_model(config.model_name_or_path, dtype=torch.float32, device="cpu", quantization=FourfoldConfig())
    adapted = prepare(model, choices.lora_config(config))
    with pytest.raises(TrainingError) as error:
        planning.require_planned_shape(config, adapted)
    assert "layers: planned 3, found 2" in str(error.value)
    assert "adapter matrices: planned 42, found 28" in str(error.value)
    assert "plan: false" in str(error.value)


def test_a_run_asks_whether_its_model_is_what_was_planned(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    def differs(*_: Any) -> Iterator[str]:
        yield "layers: planned 32, found 30"

    monkeypatch.setattr(planning, "shape_differences", differs)
    with pytest.raises(TrainingError, match="planned 32, found 30"):
        pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_metrics_have_what_was_planned_by_part(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan]
) -> None:
    run = pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")
    names = ("weights", "adapters", "optimizer_state", "rest")
    assert sum(run.metrics[f"planned_memory_{name}_bytes"] for name in names) == run.metrics["planned_peak_bytes"]
    assert "| planned_peak_bytes |" in (run.output_dir / "README.md").read_text()


@pytest.mark.parametrize("verb", ["train", "evaluate", "quantize_checkpoint"])
def test_the_limit_holds_from_before_loading_on_and_for_every_verb(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    within: list[tuple[str, int | None]] = []

    @contextlib.contextmanager
    def limit(device: torch.device, num_bytes: int | None) -> Iterator[None]:
        within.append((device.type, num_bytes))
        yield

    def load_model(*_: Any, **__: Any) -> Any:
        assert within == [("cpu", 3 * 2**29)]
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(limiting, "memory_limit", limit)
    monkeypatch.setattr(pipeline, "load_model", load_model)
    config = tiny_run(tmp_path, gpu_memory_limit="1.5GB")
    words = (config, tmp_path / "out") if verb == "quantize_checkpoint" else (config,)
    with pytest.raises((TrainingError, torch.OutOfMemoryError), match="CUDA out of memory"):
        getattr(pipeline, verb)(*words)


@pytest.mark.parametrize(
    "said", ["Triton Error [CUDA]: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"]
)
def test_memory_that_runs_out_outside_of_the_allocator_is_the_same(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    failing(monkeypatch, 2, error=RuntimeError(said))
    run = pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")
    assert max(record["step"] for record in _log(run)) == 4


def test_another_error_is_not_taken_for_it(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], planned: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, 2, error=RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pipeline.train(tiny_run(tmp_path, **FUSED), progress="silent")
