"""Plans from configurations, what helps where nothing fits, and what `fourfold plan` prints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config
from typer.testing import CliRunner

from fourfold import planning
from fourfold.cli import app
from fourfold.config import RunConfig
from fourfold.errors import CheckpointError, ConfigError, TrainingError
from fourfold.memory.gpus import Gpu, gpu_by_name
from fourfold.memory.planner import Plan
from fourfold.planning import (
    PLANNED_OPTIMIZERS,
    find_gpus,
    find_host,
    kept_to,
    plan,
    plan_for_training,
    step_down,
)
from fourfold.training.options import OPTIMIZERS

GIB = 2**30


def configured(model: Path, **keys: Any) -> RunConfig:
    defaults = {"train_dataset": "rows.jsonl", "output_dir": "run", "optim": "adamw_8bit", "max_length": 2048}
    return RunConfig(model_name_or_path=str(model), **{**defaults, **keys})


def test_a_plan_needs_a_configuration_and_no_weights(llama: Path) -> None:
    made = plan(configured(llama), gpu_by_name("24GB"))
    assert made.chosen is not None
    assert made.chosen.batch * made.chosen.accumulation == 16
    assert made.chosen.optimizer == "adamw_8bit"


def test_state_is_where_the_optimizer_keeps_it(llama: Path) -> None:
    made = {name: plan(configured(llama, optim=name), gpu_by_name("80GB")).chosen for name in OPTIMIZERS}
    for name, candidate in made.items():
        assert candidate is not None
        assert candidate.optimizer == name
        parts, host = candidate.footprint.parts, candidate.footprint.host
        assert ("optimizer state" in parts) is ("paged" not in name)
        assert ("optimizer state" in host) is ("paged" in name)


def test_an_optimizer_that_is_not_given_is_planned_and_one_that_is_given_is_kept(llama: Path) -> None:
    gpu = gpu_by_name("80GB")
    made = plan(configured(llama, optim=None), gpu)
    assert made.chosen is not None
    assert made.chosen.optimizer == "adamw"
    assert "adamw (0.31 GiB on the GPU)" in "\n".join(made.lines())
    assert kept_to(configured(llama, optim=None), made).optim == "adamw"
    given = configured(llama, optim="paged_lion_8bit")
    assert kept_to(given, plan(given, gpu)).optim == "paged_lion_8bit"


def test_without_a_plan_the_optimizer_is_adamw(llama: Path) -> None:
    assert kept_to(configured(llama, optim=None), None).optim == "adamw"
    assert kept_to(configured(llama, optim="lion"), None).optim == "lion"


def test_a_large_adapter_is_paged_or_kept_in_8_bits_before_nothing_fits(llama: Path) -> None:
    config = configured(llama, optim=None, lora_r=512, max_length=2048)
    found = {amount: plan(config, gpu_by_name(amount)).chosen for amount in ("100GB", "24GB", "20GB")}
    optimizers = {amount: candidate.optimizer for amount, candidate in found.items() if candidate}
    assert optimizers["100GB"] == "adamw"
    assert len(optimizers) == 3
    assert plan(config.model_copy(update={"optim": "adamw"}), gpu_by_name("20GB")).chosen is None


@pytest.mark.parametrize("begun", PLANNED_OPTIMIZERS)
def test_a_step_down_keeps_state_of_the_same_bits(llama: Path, begun: str) -> None:
    config = configured(llama, optim=None)
    made: Plan | None = plan(config.model_copy(update={"optim": begun}), gpu_by_name("24GB"))
    for _ in range(4):
        assert made is not None
        assert made.chosen is not None
        assert ("8bit" in made.chosen.optimizer) is ("8bit" in begun)
        made = step_down(config, made)


def test_a_step_down_keeps_the_optimizer_that_was_given(llama: Path) -> None:
    config = configured(llama, optim="adamw")
    made = step_down(config, plan(config, gpu_by_name("24GB")))
    assert made is not None
    assert made.chosen is not None
    assert made.chosen.optimizer == "adamw"


def test_a_policy_that_is_asked_for_is_kept_to(llama: Path) -> None:
    made = plan(configured(llama, recompute="full"), gpu_by_name("80GB"))
    assert made.chosen is not None
    assert made.chosen.recompute == "full"


def test_held_out_rows_are_in_the_plan(llama: Path) -> None:
    keys = {"per_device_eval_batch_size": 512, "recompute": "full", "cuda_graphs": False}
    with_rows = plan(configured(llama, eval_split_fraction=0.1, **keys), gpu_by_name("80GB"))
    without = plan(configured(llama, **keys), gpu_by_name("80GB"))
    assert without.chosen is not None
    candidate = with_rows.chosen or with_rows.smallest
    assert candidate is not None
    assert candidate.footprint.moment == "evaluation"


def test_a_run_keeps_to_its_plan_with_the_same_rows_a_step(llama: Path) -> None:
    config = configured(llama, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    made = plan_for_training(config, gpu_by_name("16GB"))
    assert made is not None
    assert made.chosen is not None
    kept = kept_to(config, made)
    assert kept.per_device_train_batch_size * kept.gradient_accumulation_steps == 16
    assert kept.per_device_train_batch_size <= 8
    assert kept.recompute == made.chosen.recompute


def test_nothing_is_planned_off_gpus_nor_over_what_is_asked_for_nor_without_formulas(llama: Path) -> None:
    gpu = gpu_by_name("24GB")
    assert plan_for_training(configured(llama), None) is None
    assert plan_for_training(configured(llama, recompute="full"), gpu) is None
    assert plan_for_training(configured(llama, plan=False), gpu) is None
    assert plan_for_training(configured(llama, method="reward"), gpu) is None
    full = {"adapter": None, "load_in_4bit": False}
    assert plan_for_training(configured(llama, **full, bnb_4bit_compute_dtype="float16"), gpu) is None
    assert plan_for_training(configured(Path("model.gguf")), gpu) is None


def test_a_run_that_cannot_fit_does_not_begin_and_says_what_would(llama: Path) -> None:
    with pytest.raises(TrainingError) as error:
        plan_for_training(configured(llama, load_in_4bit=False), gpu_by_name("12GB"))
    assert "nothing fits" in str(error.value)
    assert "QLoRA: the base in 4 bits (--load_in_4bit true)" in str(error.value)


@pytest.mark.parametrize(
    "keys",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"fused_blocks": False}, {"modules_to_save": ["lm_head"]}],
    ids=["dropout", "dora", "not-fused", "head-trained"],
)
def test_layers_on_the_generic_path_keep_all_or_their_input_and_a_run_keeps_to_that(
    llama: Path, keys: dict[str, Any]
) -> None:
    config = configured(llama, **keys)
    for gpu, policy in (("16GB", "full"), ("H200", "none")):
        made = plan_for_training(config, gpu_by_name(gpu))
        assert made is not None
        assert made.chosen is not None
        assert made.chosen.recompute == policy
        kept = kept_to(config, made)
        assert kept.recompute is None
        assert kept.gradient_checkpointing is (policy == "full")
        assert kept.optim == made.chosen.optimizer
        assert kept.per_device_train_batch_size == made.chosen.batch


def test_full_fine_tuning_is_planned_with_gradients_and_state_of_all_weights(llama: Path) -> None:
    config = configured(llama, adapter=None, load_in_4bit=False)
    assert plan(config, gpu_by_name("40GB")).chosen is None
    made = plan(config, gpu_by_name("H200")).chosen
    assert made is not None
    parts = made.footprint.parts
    assert parts["weights, 16 bits"] == 2 * 8_030_261_248
    assert "adapters" not in parts
    assert parts["optimizer state"] > parts["weights, 16 bits"]
    paged = plan(configured(llama, adapter=None, load_in_4bit=False, optim="paged_adamw_8bit"), gpu_by_name("80GB"))
    assert paged.chosen is not None
    assert paged.chosen.footprint.host["optimizer state"] == parts["optimizer state"]


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"fused_blocks": False, "recompute": "selective"}, "gradient_checkpointing is theirs"),
        ({"adapter": None}, "weights are frozen"),
        ({"lora_dropout": 0.1, "packing": True}, "mask of packed rows is not counted"),
    ],
)
def test_what_cannot_be_planned_is_refused(llama: Path, keys: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        plan(configured(llama, **keys), gpu_by_name("24GB"))


def test_packed_rows_on_the_generic_path_are_not_planned_for_training(llama: Path) -> None:
    gpu = gpu_by_name("24GB")
    assert plan_for_training(configured(llama, packing=True), gpu) is not None
    assert plan_for_training(configured(llama, packing=True, use_dora=True), gpu) is None


def test_models_without_fused_blocks_are_planned_and_missing_ones_refused(tmp_path: Path) -> None:
    GPT2Config(n_layer=2, n_embd=64, n_head=2).save_pretrained(tmp_path / "gpt2")
    made = plan(configured(tmp_path / "gpt2", max_length=128), gpu_by_name("24GB"))
    assert made.chosen is not None
    assert made.chosen.recompute == "none"
    with pytest.raises(CheckpointError, match="no model"):
        plan(configured(tmp_path / "nothing"), gpu_by_name("24GB"))


def run_plan(llama: Path, tmp_path: Path, *words: str) -> Any:
    config = tmp_path / "run.yaml"
    config.write_text(f"model_name_or_path: {llama}\ntrain_dataset: rows.jsonl\noutput_dir: run\nmax_length: 2048\n")
    return CliRunner().invoke(app, ["plan", str(config), *words])


def test_the_verb_prints_the_plan_for_people_and_for_machines(llama: Path, tmp_path: Path) -> None:
    told = run_plan(llama, tmp_path, "--gpu", "24GB")
    assert told.exit_code == 0, told.output
    assert "tokens/s, peak" in told.stdout
    assert "weights, quantized" in told.stdout
    made = json.loads(run_plan(llama, tmp_path, "--gpu", "24GB", "--json").stdout)
    assert made["chosen"]["peak_bytes"] == sum(made["chosen"]["parts"].values())
    assert made["remedies"] == []


def test_the_verb_fails_where_nothing_fits_and_says_what_would(llama: Path, tmp_path: Path) -> None:
    told = run_plan(llama, tmp_path, "--gpu", "12GB", "--no-load_in_4bit")
    assert told.exit_code == 1
    assert "would fit: QLoRA: the base in 4 bits (--load_in_4bit true)" in told.stdout


def test_strategies_are_printed_and_drawn(llama: Path, tmp_path: Path) -> None:
    picture = tmp_path / "bars.png"
    told = run_plan(llama, tmp_path, "--gpu", "24GB", "--compare", "--picture", str(picture))
    assert told.exit_code == 0, told.output
    assert "QLoRA, selective_offload" in told.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"
    rows = json.loads(run_plan(llama, tmp_path, "--gpu", "24GB", "--compare", "--json").stdout)["strategies"]
    assert len(rows) == 17


def test_several_gpus_are_a_forecast_and_told_as_one(llama: Path, tmp_path: Path) -> None:
    for words in (("--gpu", "2xH200"), ("--gpu", "H200", "--gpus", "2")):
        told = run_plan(llama, tmp_path, *words)
        assert told.exit_code == 0, told.output
        assert "plan for 2 x H200" in told.stdout
        assert "a forecast: fourfold trains on one GPU so far" in told.stdout
    made = json.loads(run_plan(llama, tmp_path, "--gpu", "2 x 24GB", "--json").stdout)["chosen"]
    assert made["num_gpus"] == 2
    assert made["strategy"] in ("data parallel", "sharded")
    assert made["traffic_bytes"] > 0
    told = run_plan(llama, tmp_path, "--gpu", "2xH200", "--compare")
    assert "QLoRA, sharded" in told.stdout
    assert "forecast" in told.stdout


@pytest.mark.parametrize("words", [("2xH200", 4), ("0xH200", None), ("H200", 0)])
def test_a_number_of_gpus_that_is_not_clear_is_refused(words: tuple[str, int | None]) -> None:
    with pytest.raises(ConfigError, match="how many GPUs"):
        find_gpus(*words)


@pytest.mark.parametrize(
    ("keys", "help_"),
    [
        ({"optim": "paged_adamw_32bit"}, "optimizer state on the GPU (--optim adamw_8bit)"),
        ({"stream_base": "host"}, "the base on the GPU (--stream_base null)"),
    ],
)
def test_less_host_memory_than_paging_needs_is_refused_before_anything_is_loaded(
    llama: Path, keys: dict[str, Any], help_: str
) -> None:
    with pytest.raises(TrainingError) as error:
        plan_for_training(configured(llama, **keys), gpu_by_name("24GB"), host_bytes=10**8)
    assert "GiB more of host memory than the 0.1 GiB there are" in str(error.value)
    assert help_ in str(error.value)


def test_host_memory_here_is_what_the_system_and_the_control_group_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "spare_bytes", lambda: 12345)
    assert find_host(None, is_here=True) == 12345
    assert find_host(None, is_here=False) is None
    assert find_host("64GB", is_here=True) == 64 * 2**30


def test_the_verb_plans_for_the_limit_and_for_a_named_gpu_all_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def present(*, limit: int | None) -> Gpu | None:
        return replace(gpu_by_name("80GB"), name="limited", memory_bytes=limit) if limit else None

    monkeypatch.setattr(planning, "gpu_present", present)
    for amount in ("16GB", "16"):
        told = run_plan(llama, tmp_path, "--gpu_memory_limit", amount)
        assert told.exit_code == 0, told.output
        assert told.stdout.startswith("plan for limited: 14.6 GiB usable of 16.0")
    assert "plan for H200" in run_plan(llama, tmp_path, "--gpu", "H200", "--gpu_memory_limit", "16GB").stdout


@pytest.mark.parametrize("amount", ["0GB", "8 apples", "-3GB", "true"])
def test_a_limit_that_is_no_amount_is_refused(llama: Path, tmp_path: Path, amount: str) -> None:
    told = run_plan(llama, tmp_path, f"--gpu_memory_limit={amount}")
    assert told.exit_code == 2
    assert "memory" in told.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_must_be_named() -> None:
    with pytest.raises(ConfigError, match="no GPU here"):
        find_gpus(None)


@pytest.mark.parametrize("keys", [{"plan": False}, {"recompute": "full"}])
def test_a_run_that_asks_for_no_plan_has_none(llama: Path, keys: dict[str, Any]) -> None:
    gpu = gpu_by_name("24GB")
    assert plan_for_training(configured(llama), gpu) is not None
    assert plan_for_training(configured(llama, **keys), gpu) is None
