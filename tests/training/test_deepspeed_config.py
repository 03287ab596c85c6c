from __future__ import annotations

import dataclasses
import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from fourfold.errors import ConfigError
from fourfold.training import deepspeed_config as module
from fourfold.training.deepspeed_config import (
    OFFLOADS,
    ZeroOptions,
    deepspeed_config,
    read_deepspeed_file,
    stage_of_file,
)

OPTIONS = ZeroOptions(
    stage=3,
    offload="none",
    num_processes=2,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=8,
    max_grad_norm=0.5,
    computes_in_bf16=True,
    on_gpu=True,
)
# What LLaMA-Factory's and Axolotl's files for stage 3 say, in the field's names.
FILE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0},
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "reduce_bucket_size": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: object())


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "deepspeed.json"
    zero = FILE["zero_optimization"] | changes.pop("zero_optimization", {})
    path.write_text(json.dumps(FILE | changes | {"zero_optimization": zero}))
    return path


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_takes_the_configuration_that_is_made(stage, offload):
    runtime = pytest.importorskip("deepspeed.runtime.zero.config")
    config = deepspeed_config(dataclasses.replace(OPTIONS, stage=stage, offload=offload))
    zero = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    taken = runtime.DeepSpeedZeroConfig(**zero)
    assert taken.stage == stage
    assert (taken.offload_optimizer is not None) == (offload != "none")
    assert (taken.offload_param is not None) == (offload == "all")
    assert config["train_batch_size"] == 2 * 4 * 8
    assert config["gradient_clipping"] == 0.5


def test_a_file_of_other_systems_fits_and_is_filled_in(installed, tmp_path):
    path = written(tmp_path)
    assert stage_of_file(path) == 3
    config = read_deepspeed_file(path, OPTIONS)
    assert config["zero_optimization"] == FILE["zero_optimization"]
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["bf16"] == {"enabled": False}, "adapters stay fp32, and the base is bf16 already"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu is 2, the run's is 4"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, the run's is 8"),
        ({"train_batch_size": 32}, "train_batch_size is 32, the run's is 64"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, the run's is 0.5"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer is not for the file"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is not for the file"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device is nvme"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights would quantize"),
    ],
)
def test_what_differs_from_the_run_is_named(changes, named, installed, tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_file(written(tmp_path, **changes), OPTIONS)
    assert named in str(caught.value)


def test_all_that_differs_is_named_together(installed, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)train_batch_size is 1.*gradient_clipping is 2"):
        read_deepspeed_file(written(tmp_path, train_batch_size=1, gradient_clipping=2), OPTIONS)


def test_bf16_in_the_file_wants_a_run_in_bf16(installed, tmp_path):
    with pytest.raises(ConfigError, match="bf16 is enabled, and the run computes in float32"):
        read_deepspeed_file(written(tmp_path), dataclasses.replace(OPTIONS, computes_in_bf16=False))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "cannot be read"),
        ("{", "is no JSON"),
        ("[]", "holds no configuration"),
        ("{}", "names no stage"),
        ('{"zero_optimization": {"stage": 0}}', "names no stage"),
    ],
)
def test_a_file_that_says_nothing_is_refused(text, named, tmp_path):
    path = tmp_path / "deepspeed.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=named):
        stage_of_file(path)


def test_without_deepspeed_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "deepspeed" else util.find_spec(name))
    with pytest.raises(ConfigError, match=r"pip install 'fourfold\[deepspeed\]'"):
        deepspeed_config(OPTIONS)
