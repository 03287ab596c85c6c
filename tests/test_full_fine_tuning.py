"""Runs that train all weights of a model, over a tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.errors import ConfigError
from fourfold.memory.gpus import gpu_by_name
from fourfold.models.loading import load_model
from fourfold.optimizers import AdamW
from fourfold.planning import plan_for_training, require_planned_shape

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

FULL = {"adapter": None, "load_in_4bit": False, "learning_rate": 1e-3}


def weights(run: pipeline.Run) -> dict[str, torch.Tensor]:
    return load_file(run.output_dir / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory) -> tuple[RunConfig, pipeline.Run]:
    config = tiny_run(tmp_path_factory.mktemp("full"), gradient_checkpointing=True, **FULL)
    return config, pipeline.train(config, progress="silent")


def test_all_weights_are_trained_and_stand_as_a_model_that_transformers_reads(finished, tiny_llama) -> None:
    _, run = finished
    before, after = load_file(tiny_llama / "model.safetensors"), weights(run)
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert {path.name for path in run.output_dir.iterdir()} >= {"model", "config.yaml", "checkpoint-4", "README.md"}
    assert not (run.output_dir / "adapter").exists()
    assert "library_name: transformers" in (run.output_dir / "model" / "README.md").read_text()
    plain = AutoModelForCausalLM.from_pretrained(run.output_dir / "model")
    assert torch.equal(plain.lm_head.weight, after["lm_head.weight"])


def test_what_was_trained_is_measured_and_answers(finished) -> None:
    config, run = finished
    measured = pipeline.evaluate(config, progress="silent")
    assert measured["eval_loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-5)
    whole = pipeline.chat(str(run.output_dir), max_new_tokens=4).model
    assert torch.equal(whole.lm_head.weight, weights(run)["lm_head.weight"])


@pytest.mark.parametrize(("dtype", "moves"), [(torch.bfloat16, False), (torch.float32, True)])
def test_weights_in_bf16_lose_updates_far_below_them(dtype: torch.dtype, moves: bool) -> None:
    weight = torch.nn.Parameter(torch.full((64,), 0.02, dtype=dtype))
    before = weight.detach().clone()
    optimizer = AdamW([weight], lr=1e-5)
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, before) is not moves


def test_there_is_nothing_to_merge(finished, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to merge"):
        pipeline.merge(str(finished[1].output_dir), tmp_path / "merged")


@pytest.mark.parametrize(("dtype", "optim"), [("float32", "adamw"), ("bfloat16", "paged_adamw_8bit")])
def test_a_resumed_run_ends_with_the_same_weights(tiny_run, tmp_path: Path, dtype: str, optim: str) -> None:
    keys = {**FULL, "optim": optim, "bnb_4bit_compute_dtype": dtype, "save_total_limit": None}
    straight = pipeline.train(tiny_run(tmp_path, **keys), progress="silent")
    again = tiny_run(tmp_path, **keys, resume_from_checkpoint=str(straight.output_dir / "checkpoint-2"))
    resumed = pipeline.train(again.model_copy(update={"output_dir": str(tmp_path / "resumed")}), progress="silent")
    wanted, got = weights(straight), weights(resumed)
    assert {value.dtype for value in wanted.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"load_in_4bit": True}, "load_in_4bit"),
        ({"load_in_8bit": True}, "load_in_8bit"),
        ({"recompute": "full"}, "gradient_checkpointing"),
        ({"method": "dpo"}, "precompute_ref_log_probs"),
    ],
)
def test_what_needs_a_frozen_base_is_refused(tiny_run, tmp_path: Path, keys: dict[str, object], said: str) -> None:
    config = tiny_run(tmp_path, **(FULL | keys))
    with pytest.raises(ConfigError, match=said):
        pipeline.train(config, progress="silent")
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_quantized_anew_is_refused_where_there_is_no_adapter() -> None:
    with pytest.raises(ValueError, match="requantize_every is given, and there is no adapter"):
        RunConfig(model_name_or_path="m", requantize_every=2, **FULL)


def test_a_quantized_checkpoint_is_no_base_for_it(tiny_run, tmp_path: Path) -> None:
    pipeline.quantize_checkpoint(tiny_run(tmp_path), tmp_path / "quantized")
    config = tiny_run(tmp_path, **FULL, model_name_or_path=str(tmp_path / "quantized"))
    with pytest.raises(ConfigError, match="quantized"):
        pipeline.train(config, progress="silent")


def test_it_is_planned_and_the_plan_knows_the_model(tiny_run, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, **FULL)
    planned = plan_for_training(config, gpu_by_name("24GB"))
    assert planned is not None
    assert planned.chosen is not None
    require_planned_shape(config, load_model(config.model_name_or_path, dtype=torch.float32))
