"""What would fit where a plan does not, and strategies side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fourfold.config import RunConfig
from fourfold.errors import ConfigError
from fourfold.memory.gpus import gpu_by_name
from fourfold.memory.parallel import STRATEGIES
from fourfold.planning import plan
from fourfold.remedies import compare, remedies

GIB = 2**30


def configured(model: Path, **keys: Any) -> RunConfig:
    defaults = {"train_dataset": "rows.jsonl", "output_dir": "run", "optim": "adamw_8bit", "max_length": 2048}
    return RunConfig(model_name_or_path=str(model), **{**defaults, **keys})


def test_an_optimizer_is_a_remedy_only_where_one_was_given(llama: Path) -> None:
    gpu = gpu_by_name("24GB")
    keys = {"lora_r": 512, "max_length": 4096, "recompute": "full", "cuda_graphs": False}
    given = configured(llama, optim="adamw", **keys)
    assert plan(given, gpu).chosen is None
    assert any("optim" in remedy.change for remedy in remedies(given, gpu))
    planned = configured(llama, optim=None, **keys)
    assert all("optim" not in remedy.change for remedy in remedies(planned, gpu_by_name("12GB")))


def test_remedies_are_named_from_the_easiest_on_and_each_makes_it_fit(llama: Path) -> None:
    config = configured(llama, load_in_4bit=False, optim="adamw", bnb_4bit_compute_dtype="float32")
    gpu = gpu_by_name("16GB")
    assert plan(config, gpu).chosen is None
    found = list(remedies(config, gpu))
    assert found
    for remedy in found:
        remade = plan(config.model_copy(update=remedy.change), gpu)
        assert remade.chosen is not None
    assert "load_in_4bit" in found[0].change


def test_where_no_change_helps_none_is_named(llama: Path) -> None:
    assert list(remedies(configured(llama), gpu_by_name("2GB"))) == []


def test_streaming_is_named_where_nothing_easier_helps(llama: Path) -> None:
    found = list(remedies(configured(llama), gpu_by_name("5GB")))
    assert found
    assert found[0].change["stream_base"] == "host"
    assert found[0].plan.chosen is not None
    assert found[0].plan.chosen.footprint.host["weights"] > 3 * 2**30


def test_more_gpus_are_the_last_remedy_and_no_more_than_it_takes(llama_70b: Path) -> None:
    config = configured(llama_70b, optim=None, max_length=256, lora_r=16, stream_base="disk")
    gpu = gpu_by_name("12GB")
    found = list(remedies(config, gpu, host_bytes=GIB))
    assert len(found) == 1
    number = found[0].num_gpus
    assert number is not None
    assert f"--gpus {number} --distributed fsdp2" in str(found[0])
    stays = config.model_copy(update={"stream_base": None, "distributed": "fsdp2"})
    for fewer in range(1, number):
        assert plan(stays, gpu, GIB, fewer).chosen is None
    assert plan(stays, gpu, GIB, number).chosen is not None


@pytest.mark.parametrize("keys", [{}, {"distributed": "fsdp2"}, {"distributed": "ddp"}])
def test_several_gpus_are_given_no_base_that_streams_which_training_refuses(
    llama_70b: Path, keys: dict[str, Any]
) -> None:
    config = configured(llama_70b, optim=None, **keys)
    found = list(remedies(config, gpu_by_name("24GB"), num_gpus=2))
    assert found
    assert all("stream_base" not in one.change for one in found)
    with pytest.raises(ConfigError, match=r"a base that streams belongs to one GPU"):
        plan(config.model_copy(update={"stream_base": "host"}), gpu_by_name("24GB"), num_gpus=2)


def test_of_several_gpus_ways_to_share_the_run_are_compared(llama: Path) -> None:
    config = configured(llama, optim=None)
    rows = {row.name: row.plan.chosen or row.plan.smallest for row in compare(config, gpu_by_name("24GB"), num_gpus=2)}
    every = [f"{base}, {name}" for base in ("LoRA", "QLoRA") for name in STRATEGIES]
    assert list(rows) == every
    # 16 GB of weights are half as many on each of two.
    weights = [rows[f"LoRA, {name}"] for name in ("ddp", "fsdp2")]
    sizes = [one.footprint.parts["weights, 16 bits"] for one in weights if one]
    assert sizes[1] < 0.51 * sizes[0]


def test_one_strategy_that_is_given_is_compared_alone(llama: Path) -> None:
    rows = compare(configured(llama, distributed="fsdp2"), gpu_by_name("24GB"), num_gpus=2)
    assert [row.name for row in rows] == ["LoRA, fsdp2", "QLoRA, fsdp2"]


def test_strategies_are_compared_side_by_side(llama: Path) -> None:
    rows = compare(configured(llama), gpu_by_name("24GB"))
    peaks = {row.name: (row.plan.chosen or row.plan.smallest) for row in rows}
    assert len(peaks) == 17
    for name, candidate in peaks.items():
        assert candidate is not None
        if name.startswith("LoRA"):
            twin = peaks[f"Q{name}"]
            assert twin is not None
            weights = candidate.footprint.parts["weights, 16 bits"]
            assert weights > 2.5 * twin.footprint.parts["weights, 16 bits"]


def test_where_full_fine_tuning_does_not_fit_an_adapter_is_named_before_quantizing(llama: Path) -> None:
    config = configured(llama, adapter=None, load_in_4bit=False)
    large, small = ([str(one) for one in remedies(config, gpu_by_name(name))] for name in ("40GB", "12GB"))
    assert "LoRA: adapters instead of all weights (--adapter lora)" in large
    assert any("QLoRA: the base in 4 bits" in one and "--adapter lora" in one for one in small)


def test_full_fine_tuning_is_shared_by_gpus_with_its_weights_gradients_and_state(llama: Path) -> None:
    config = configured(llama, adapter=None, load_in_4bit=False)
    rows = {row.name: row.plan.chosen or row.plan.smallest for row in compare(config, gpu_by_name("H200"), num_gpus=4)}
    whole, sharded = rows["full fine-tuning, ddp"], rows["full fine-tuning, fsdp2"]
    assert whole is not None
    assert sharded is not None
    every = 2 * 8_030_261_248
    assert whole.footprint.parts["weights, 16 bits"] == whole.footprint.parts["buckets of gradients"] == every
    assert sharded.footprint.parts["weights, 16 bits"] == pytest.approx(every / 4, rel=1e-5)
    assert whole.traffic == {"gradients reduced": 2 * every * 3 // 4}
    # Summed in fp32.
    assert sharded.traffic["gradients scattered"] == sharded.accumulation * 2 * every * 3 // 4
    assert "QLoRA, fsdp2" in rows


def test_full_fine_tuning_is_compared_with_its_two_ways(llama: Path) -> None:
    rows = compare(configured(llama, adapter=None, load_in_4bit=False), gpu_by_name("H200"))
    assert [row.name for row in rows if row.name.startswith("full")] == [
        "full fine-tuning, none",
        "full fine-tuning, full",
    ]
    dora = compare(configured(llama, use_dora=True), gpu_by_name("24GB"))
    assert [row.name for row in dora] == [
        *("LoRA, none", "LoRA, full", "QLoRA, none", "QLoRA, full"),
        "QLoRA, streaming, full",
    ]


def test_a_change_to_null_is_written_as_the_command_line_takes_it(llama: Path) -> None:
    gpu = gpu_by_name("10GB")
    found = [str(remedy) for remedy in remedies(configured(llama, recompute="none"), gpu)]
    assert found[0] == "recompute as planned (--recompute null)"
