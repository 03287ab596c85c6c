from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError


def config(**keys: Any) -> RunConfig:
    return RunConfig(**({"model_name_or_path": "base", "train_dataset": "rows.jsonl"} | keys))


def file(folder: Path, stage: int) -> str:
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    return str(path)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"distributed_offload": "optimizer"}, "distributed: auto has none"),
        ({"distributed": "ddp", "distributed_offload": "optimizer"}, "distributed: ddp has none"),
        ({"distributed": "zero2", "distributed_offload": "all"}, "which zero2 does not part"),
        ({"distributed": "zero1", "optim": "adamw_8bit"}, "optim is adamw_8bit"),
        ({"distributed": "zero3", "optim": "lion"}, "optim is lion"),
        ({"distributed": "zero2", "adapter": None}, "adapter is null"),
        ({"distributed": "zero2", "stream_base": "host"}, "stream_base is given"),
        ({"distributed": "zero3", "stream_base": "host"}, "the base is sharded instead of streamed"),
        ({"distributed": "zero2", "requantize_every": 5}, "requantize_every"),
        ({"distributed": "zero2", "cuda_graphs": True}, "cuda_graphs"),
        ({"distributed": "zero3", "quantize_embeddings": True}, "quantized embedding"),
        ({"distributed": "zero2", "bnb_4bit_compute_dtype": "float16"}, "float16"),
        ({"distributed": "ddp", "deepspeed": "zero2.json"}, "distributed: ddp is without it"),
        ({"deepspeed": "zero2.json", "distributed_offload": "optimizer"}, "stands in the file"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(keys, named):
    with pytest.raises(ValidationError) as caught:
        config(**keys)
    assert named in str(caught.value)


@pytest.mark.parametrize("optim", ["adamw", "adamw_torch", "adamw_torch_fused"])
def test_zero3_has_every_adamw_with_32_bit_state(optim):
    assert config(distributed="zero3", optim=optim).optim == optim


@pytest.mark.parametrize("distributed", ["zero1", "zero2", "zero3"])
def test_the_optimizer_is_the_one_that_zero_parts_and_not_a_planned_one(distributed):
    assert choices.with_deepspeed(config(distributed=distributed)).optim == "adamw"
    assert choices.with_deepspeed(config()).optim is None


def test_a_file_says_the_strategy_by_its_stage(tmp_path):
    given = config(deepspeed=file(tmp_path, 3))
    resolved = choices.with_deepspeed(given)
    assert (resolved.distributed, resolved.optim) == ("zero3", "adamw")
    assert choices.with_deepspeed(resolved) == resolved


def test_a_file_of_another_stage_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="of another stage"):
        choices.with_deepspeed(config(deepspeed=file(tmp_path, 3), distributed="zero2"))


def test_what_contradicts_the_stage_of_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="quantized embedding"):
        choices.with_deepspeed(config(deepspeed=file(tmp_path, 3), quantize_embeddings=True))
