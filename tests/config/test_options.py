from __future__ import annotations

import pytest
import torch

from fourfold.config import RunConfig, options
from fourfold.errors import ConfigError


def config(**keys: object) -> RunConfig:
    return RunConfig(model_name_or_path="m", **keys)


def test_the_device_is_the_one_named_and_must_be_there() -> None:
    assert options.device(config(device="cpu")) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device is not there(.|\n)*cuda:77(.|\n)*auto, cpu"):
        options.device(config(device="cuda:77"))


def test_fp16_may_compute_but_not_train() -> None:
    half = config(bnb_4bit_compute_dtype="float16", device="cpu")
    assert options.compute_dtype(half) == torch.float16
    with pytest.raises(ConfigError, match="bnb_4bit_compute_dtype: float16"):
        options.compute_dtype(half, for_training=True)


def test_quantization_keys_reach_the_quantizer_and_false_means_none() -> None:
    keys = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_blocksize": 128, "bnb_4bit_use_double_quant": False}
    quantization = options.load_options(config(device="cpu", modules_to_not_convert=["q_proj"], **keys))["quantization"]
    assert {key: getattr(quantization, key) for key in keys} == keys
    assert quantization.modules_to_not_convert == ["q_proj"]
    assert options.load_options(config(device="cpu", load_in_4bit=False))["quantization"] is None


def test_a_base_that_streams_is_loaded_to_the_cpu_by_whoever_lets_it_stream_then() -> None:
    streams = config(device="cpu", stream_base="disk")
    assert options.stream_options(streams) == {"stream_base": "disk", "device": torch.device("cpu")}
    assert options.load_options(streams, streams=True)["device"] == torch.device("cpu")
    if torch.cuda.is_available():
        on_gpu = config(device="cuda:0", stream_base="host")
        assert options.load_options(on_gpu, streams=True)["device"] == torch.device("cpu")
        assert options.load_options(on_gpu)["device"] == options.stream_options(on_gpu)["device"]


def test_adapter_keys_are_pefts_own() -> None:
    lora = options.lora_config(
        config(lora_r=3, lora_alpha=5, lora_dropout=0.5, use_rslora=True, init_lora_weights="gaussian")
    )
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.use_rslora) == (3, 5, 0.5, True)
    assert (lora.init_lora_weights, lora.task_type, lora.modules_to_save) == ("gaussian", "CAUSAL_LM", None)
    # Those that read the base weight are not PEFT's to do over a quantized one.
    assert options.lora_config(config(init_lora_weights="pissa_niter_4")).init_lora_weights is True


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"eval_strategy": "no", "save_strategy": "epoch", "num_train_epochs": 1.0, "max_steps": -1}),
        ({"eval_dataset": "e", "max_steps": 7}, {"eval_strategy": "epoch", "max_steps": 7}),
        (
            {"train_dataset": "t", "eval_split_fraction": 0.1, "eval_steps": 5, "save_steps": 3},
            {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 3},
        ),
        ({"warmup_steps": 4}, {"warmup_steps": 4, "warmup_ratio": 0.0}),
    ],
)
def test_the_rhythm_of_a_run_is_by_epoch_unless_steps_are_given(keys, expected) -> None:
    made = options.training_options(config(device="cpu", **keys))
    assert {key: getattr(made, key) for key in expected} == expected


def test_held_out_rows_are_answered_greedily_and_never_packed() -> None:
    given = config(packing=True, eval_max_new_tokens=9, seed=3, row_format="alpaca", columns={"instruction": "q"})
    generation = options.generation_options(given)
    assert (generation.temperature, generation.max_new_tokens, generation.seed) == (0.0, 9, 3)
    assert options.data_options(given).packing
    assert not options.data_options(given, packing=False).packing
    assert options.data_options(given).columns == {"instruction": "q"}
