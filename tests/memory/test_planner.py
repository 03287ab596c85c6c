"""The plan: what is chosen, and why the next faster one is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from fourfold.errors import ConfigError
from fourfold.memory.footprint import Step, footprint
from fourfold.memory.gpus import GPUS, Gpu, gpu_by_name, parse_bytes
from fourfold.memory.planner import OptimizerBytes, Plan, make_plan
from fourfold.memory.speed import step_seconds
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.quantization.hf_config import FourfoldConfig

GIB = 2**30


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return model_shape(config, FourfoldConfig(), 16)


def planned(shape: ModelShape, gpu: Gpu, rows: int = 16, seq: int = 2048, **options: Any) -> Plan:
    optimizers = options.pop("optimizers", [OptimizerBytes("adamw_8bit", 86 * 2**20)])
    return make_plan(shape, gpu, rows=rows, seq=seq, optimizers=optimizers, **options)


def test_a_large_gpu_keeps_everything_and_a_small_one_recomputes_and_offloads(shape: ModelShape) -> None:
    large, small = planned(shape, GPUS["h200"]).chosen, planned(shape, gpu_by_name("8GB"), seq=4096).chosen
    assert large is not None
    assert small is not None
    assert large.recompute == "none"
    assert large.accumulation == 1
    assert small.recompute != "none"
    assert small.footprint.host_bytes > 0


def test_what_is_chosen_fits_and_nothing_faster_that_was_tried_does(shape: ModelShape) -> None:
    for amount in ("8GB", "12GB", "16GB", "24GB", "48GB", "80GB"):
        gpu = gpu_by_name(amount)
        plan = planned(shape, gpu)
        assert plan.chosen is not None, amount
        assert plan.chosen.footprint.peak_bytes <= gpu.usable_bytes
        assert plan.chosen.batch * plan.chosen.accumulation == 16
        if plan.faster is not None:
            assert plan.faster.tokens_per_second > plan.chosen.tokens_per_second
            assert plan.shortage(plan.faster) > 0
            assert f"{plan.shortage(plan.faster) / GIB:.2f} GiB too much" in "\n".join(plan.lines())


def test_layers_take_different_policies_where_that_fills_the_gpu(shape: ModelShape) -> None:
    # One row that keeps everything takes 11.6 GiB.
    gpu = gpu_by_name("11GB")
    plan = planned(shape, gpu, rows=1, policies=["none", "full"])
    assert plan.chosen is not None
    assert set(plan.chosen.policies) == {"none", "full"}
    assert isinstance(plan.chosen.recompute, list)
    assert len(plan.chosen.recompute) == 32
    more = [*plan.chosen.policies]
    more[more.index("full") + plan.chosen.policies.count("full") - 1] = "none"
    step = Step(1, 2048, more, optimizer_bytes=86 * 2**20)
    assert footprint(shape, step).peak_bytes > gpu.usable_bytes


def test_host_memory_that_is_not_there_is_not_planned_with(shape: ModelShape) -> None:
    gpu = gpu_by_name("8GB")
    free = planned(shape, gpu, seq=4096).chosen
    assert free is not None
    bounded = planned(shape, gpu, seq=4096, host_bytes=GIB)
    assert bounded.chosen is None or bounded.chosen.footprint.host_bytes <= GIB


def test_a_later_optimizer_is_taken_only_where_nothing_fits_with_the_first(shape: ModelShape) -> None:
    large = OptimizerBytes("adamw", 3 * GIB)
    small = OptimizerBytes("paged", 0, staging=2**27, host=3 * GIB)
    for amount, expected in (("24GB", "adamw"), ("8GB", "paged")):
        chosen = planned(shape, gpu_by_name(amount), optimizers=[large, small]).chosen
        assert chosen is not None
        assert chosen.optimizer == expected


def test_where_nothing_fits_the_smallest_way_is_named(shape: ModelShape) -> None:
    plan = planned(shape, gpu_by_name("4GB"))
    assert plan.chosen is None
    assert plan.smallest is not None
    assert plan.shortage(plan.smallest) > 0
    assert "nothing fits" in "\n".join(plan.lines())
    assert plan.to_dict()["chosen"] is None


def test_few_ways_are_looked_at_for_a_large_model_and_many_rows() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    shape = model_shape(config, FourfoldConfig(), 16)
    plan = make_plan(shape, gpu_by_name("48GB"), rows=64, seq=4096, optimizers=[OptimizerBytes("adamw", GIB)])
    assert 7 * 7 <= plan.num_tried < 200


def test_a_step_takes_longer_the_more_is_computed_again(shape: ModelShape) -> None:
    order = ["none", "mlp", "selective", "full"]
    seconds = [step_seconds(shape, GPUS["h200"], 4, 2048, [policy] * 32) for policy in order]
    assert seconds == sorted(seconds)
    slow_link = replace(GPUS["h200"], link_rate=1e9)
    assert step_seconds(shape, slow_link, 4, 2048, ["mlp_offload"] * 32) > 2 * seconds[1]


def test_a_large_base_streams_through_a_small_gpu_as_fast_as_the_link_allows() -> None:
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    shape = model_shape(config, FourfoldConfig(), 16)
    gpu = gpu_by_name("24GB")
    assert planned(shape, gpu, rows=1).chosen is None
    chosen = planned(shape, gpu, rows=1, streams="host").chosen
    assert chosen is not None
    over_the_link = 2 * sum(shape.layer_bytes) / gpu.link_rate
    assert over_the_link < chosen.seconds
    slow = planned(shape, replace(gpu, link_rate=2e9), rows=1, streams="host").chosen
    assert slow is not None
    assert 2 * sum(shape.layer_bytes) / 2e9 < slow.seconds < 1.2 * 2 * sum(shape.layer_bytes) / 2e9


@pytest.mark.parametrize(
    ("text", "name", "memory"),
    [
        ("H200", "H200", 140),
        ("nvidia geforce RTX-4090", "RTX 4090", 24),
        ("rtx4060ti", "RTX 4060 Ti", 16),
        ("A100_80GB", "A100 80GB", 80),
        ("24GB", "24 GB, as fast as an RTX 4090", 24),
        ("7.5 gib", "7.5 GB, as fast as an RTX 3060", 7.5),
        ("192g", "192 GB, as fast as an H200", 192),
    ],
)
def test_a_gpu_is_found_by_its_name_or_its_memory(text: str, name: str, memory: float) -> None:
    gpu = gpu_by_name(text)
    assert (gpu.name, gpu.memory_bytes) == (name, int(memory * GIB))
    assert 0 < gpu.usable_bytes < gpu.memory_bytes


@pytest.mark.parametrize("text", ["", "GTX 9000", "0GB", "-3GB", "GB", "24 apples"])
def test_what_is_no_gpu_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        gpu_by_name(text)
    assert "RTX 4090" in str(error.value)
    with pytest.raises(ConfigError):
        parse_bytes(text)
