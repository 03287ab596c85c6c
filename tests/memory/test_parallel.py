"""What each of several GPUs holds and passes, beside what papers, DeepSpeed, torch and Transformers say of it."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.distributed.pipeline_parallel import PipelineStage

import fourfold
from fourfold.errors import ConfigError
from fourfold.memory.footprint import Footprint, Step, footprint
from fourfold.memory.gpus import GPUS
from fourfold.memory.parallel import STRATEGIES, Parallelism
from fourfold.memory.planner import OptimizerBytes, fastest_of, make_plan
from fourfold.memory.speed import host_update_seconds, pipeline_seconds
from fourfold.memory.stages import first_layers, in_flight, stages
from fourfold.memory.traffic import layer_reductions, traffic
from fourfold.models.families import default_target_modules
from fourfold.models.followed_layer import followed_shape
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.models.sharding import held_bytes, shard_model
from fourfold.models.tensor_parts import divided_config, with_divided_ends
from fourfold.quantization.hf_config import FourfoldConfig

GIB = 2**30
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 5, "vocab_size": 1024}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 4}
ZERO = ("zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def full() -> ModelShape:
    """Full fine-tuning in bfloat16."""
    return followed_shape(LlamaConfig(**SIZES), None, None, torch.bfloat16)


@pytest.fixture(scope="module")
def qlora() -> ModelShape:
    return model_shape(LlamaConfig(**SIZES), FourfoldConfig(), 16)


def held(shape: ModelShape, parallelism: Parallelism, **options: Any) -> Footprint:
    state = parallelism.share(8 * shape.num_adapter, parallelism.shards.optimizer)
    own, host = (0, state) if parallelism.offloads_optimizer else (state, 0)
    policies = ["none"] * len(shape.blocks)
    options = {"optimizer_bytes": own, "host_optimizer_bytes": host, "accumulation": 2, **options}
    return footprint(shape, Step(1, 64, policies, cuda_graphs=False, parallelism=parallelism, **options))


def states(shape: ModelShape, parallelism: Parallelism) -> float:
    """Bytes a trained number of weights, gradients, optimizer state and fp32 copies."""
    parts = held(shape, parallelism).parts
    gradients = parallelism.gradients_held(shape.gradient_bytes)
    names = ("weights, 16 bits", "fp32 copies", "optimizer state")
    return (gradients + sum(parts.get(name, 0) for name in names)) / shape.num_adapter


@pytest.mark.parametrize(("strategy", "gigabytes"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_model_states_are_those_of_the_zero_paper_for_7_5_billion_parameters_over_64_gpus(
    full: ModelShape, strategy: str, gigabytes: float
) -> None:
    # Figure 1: Adam in mixed precision, K = 12. The last norm, which is whole, is little in a large model.
    norm = 2 * SIZES["hidden_size"] / full.num_adapter
    each = states(full, Parallelism(64, strategy)) - (norm if strategy == "zero3" else 0)
    assert each * 7.5 == pytest.approx(gigabytes, abs=0.06)


def test_without_fp32_copies_ddp_holds_twelve_of_the_papers_sixteen_bytes_a_number(full: ModelShape) -> None:
    assert states(full, Parallelism(64, "ddp")) == 2 + 2 + 8


@pytest.mark.parametrize("num_gpus", [2, 8])
def test_an_update_by_zero_takes_what_deepspeeds_own_estimators_say(full: ModelShape, num_gpus: int) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as stage_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as stage_2

    def at_update(strategy: str, offload: str = "none") -> int:
        parallelism = Parallelism(num_gpus, strategy, offload)
        made = held(full, parallelism)
        names = ("buckets of gradients", "layers on their way", "libraries")
        return made.moments["update"] - sum(made.parts.get(name, 0) for name in names)

    number = full.num_adapter
    _, on_gpu = stage_2(number, num_gpus, cpu_offload=False)
    assert at_update("zero2") == pytest.approx(on_gpu, abs=64)
    assert at_update("zero2", "optimizer") == stage_2(number, num_gpus, cpu_offload=True)[1]
    _, on_gpu, largest = stage_3(number, 0, num_gpus, cpu_offload=False)
    assert largest == 0
    norm = 2 * SIZES["hidden_size"]
    # Of stage 3 the estimator leaves out the 16-bit gradients that it counts of stage 2.
    assert at_update("zero3") - 2 * number / num_gpus == pytest.approx(on_gpu, abs=norm + 64)
    _, on_gpu, _ = stage_3(number, 0, num_gpus, cpu_offload=True, cpu_offload_params=False)
    assert at_update("zero3", "optimizer") == pytest.approx(on_gpu, abs=norm + 64)
    assert at_update("zero3", "all") <= norm


def test_what_zero_offloads_is_in_host_memory_instead(full: ModelShape) -> None:
    number = full.num_adapter
    for strategy in ZERO:
        none, optimizer = (held(full, Parallelism(4, strategy, offload)) for offload in ("none", "optimizer"))
        assert not {"optimizer state", "fp32 copies"} & optimizer.parts.keys()
        # Moments, copies and their gradients: 16 bytes a number, parted.
        assert optimizer.host_bytes == pytest.approx(16 * number / 4, abs=64)
        assert optimizer.peak_bytes < none.peak_bytes
    every = held(full, Parallelism(4, "zero3", "all"))
    assert every.host["weights"] == pytest.approx(2 * number / 4, abs=1024)
    assert every.parts["weights, 16 bits"] <= 2 * SIZES["hidden_size"]


def test_what_passes_is_what_section_7_of_the_zero_paper_says(full: ModelShape) -> None:
    # Numbers that a GPU receives in a step of one microbatch, over (N - 1) / N of all: 2 with DDP, ZeRO 1 and 2, 3 with
    # ZeRO 3, whose head is wanted but once.
    whole = full.gradient_bytes * 7 / 8
    for strategy, times in (("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3)):
        passed = traffic(full, Parallelism(8, strategy), 1, 64, ["none"] * 5, 1)
        head = full.dense_ends[1] * 7 / 8 if strategy == "zero3" else 0
        assert sum(passed.values()) == pytest.approx(times * whole - head, rel=1e-3), strategy


def test_shards_pass_in_each_microbatch_and_whole_gradients_once(full: ModelShape) -> None:
    for strategy, grows in (("ddp", False), ("zero1", False), ("zero2", True), ("zero3", True), ("fsdp2", True)):
        one, four = (traffic(full, Parallelism(8, strategy), 1, 64, ["none"] * 5, count) for count in (1, 4))
        assert (sum(four.values()) > sum(one.values())) is grows, strategy
    scattered = traffic(full, Parallelism(8, "zero2"), 1, 64, ["none"] * 5, 4)["gradients scattered"]
    assert scattered == 4 * (full.gradient_bytes * 7 // 8)


def test_of_a_frozen_base_zero_1_and_2_save_no_more_than_adapters_have(qlora: ModelShape) -> None:
    ddp, *zero = (held(qlora, Parallelism(8, name)) for name in ("ddp", "zero1", "zero2"))
    trained = 4 * qlora.num_adapter
    for one in zero:
        bucket = one.parts["buckets of gradients"]
        assert bucket == 4 * 256 * 256
        saved = ddp.peak_bytes - trained - (one.peak_bytes - bucket)
        assert 0 < saved < (1 + 2) * trained
    # The base is gathered in its 4 bits: half a byte a weight, in each pass.
    gathered = traffic(qlora, Parallelism(8, "fsdp2"), 1, 64, ["none"] * 5, 1)["weights gathered"]
    assert gathered * 8 / 7 == 2 * (sum(qlora.shardable_bytes) + trained) + 2 * 2 * 1024 * 256


@pytest.fixture
def pretended() -> Iterator[None]:
    """A group of two, of whom the other answers nothing."""
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("pretended")
def test_fully_shard_leaves_each_gpu_what_is_foretold(full: ModelShape) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh)
    here = sum(parameter.to_local().nbytes for parameter in model.parameters())
    norm = SIZES["hidden_size"]
    assert held(full, Parallelism(2, "fsdp2")).parts["weights, 16 bits"] == here + norm


@pytest.mark.usefixtures("pretended")
def test_tensor_parts_are_those_that_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = LlamaConfig(**SIZES)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, distributed_config=DistributedConfig(tp_size=2), dtype=torch.bfloat16
    )
    local = [one.to_local() if hasattr(one, "to_local") else one for one in loaded.parameters()]
    part = with_divided_ends(followed_shape(divided_config(config, 2), None, None, torch.bfloat16), 2)
    assert part.dense_bytes == part.gradient_bytes == sum(one.nbytes for one in local)
    assert sorted(part.adapter_shapes) == sorted(tuple(one.shape) for one in local)


# Left without destructors: that of DDP's reducer holds the interpreter while it waits for gloo's thread, which may want
# the interpreter for what it has to drop.
DDP_BUCKETS = """
import os
import torch
from torch import distributed, nn

distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
parallel = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32)))
for _ in range(2):
    parallel(torch.ones(1, 64)).sum().backward()
told = parallel._get_ddp_logging_data()
sizes = told.get("rebuilt_bucket_sizes") or told["bucket_sizes"]
print(sum(each.nbytes for each in parallel.parameters()), sizes, flush=True)
os._exit(0)
"""


def test_ddp_reduces_in_buckets_of_as_many_bytes_as_gradients() -> None:
    done = subprocess.run([sys.executable, "-c", DDP_BUCKETS], capture_output=True, text=True, timeout=120, check=True)
    gradients, sizes = done.stdout.split(maxsplit=1)
    size = sum(int(one) for one in sizes.split(","))
    assert Parallelism(2).bucket_bytes(int(gradients), int(gradients), 64, 4) == size == int(gradients)


def test_a_sharded_head_takes_its_size_twice_when_fsdp2_gathers_it() -> None:
    """An H200's peaks of 8B (`benchmarks/results/distributed.json`) were 0.74 GiB above plans that had it once."""
    shape = model_shape(LlamaConfig(**SIZES | {"vocab_size": 200_000}), FourfoldConfig(), 16)
    head, hidden = 2 * 200_000 * SIZES["hidden_size"], 2 * 64 * SIZES["hidden_size"]
    of = {way: held(shape, Parallelism(2, way)) for way in ("ddp", "zero3", "fsdp2")}
    assert {each.moment for each in of.values()} == {"loss"}
    working = {way: each.parts["working memory"] for way, each in of.items()}
    assert working["fsdp2"] == 2 * head + 2 * hidden
    assert working["zero3"] == working["ddp"] + head


@pytest.mark.parametrize("num_layers", [5, 32, 80])
@pytest.mark.parametrize("num_stages", [2, 3, 5])
def test_stages_have_the_layers_that_transformers_gives_them(num_layers: int, num_stages: int) -> None:
    stage = object.__new__(PipelineStage)
    stage.pp_size = num_stages
    ends = [stage.layer_range_for_rank(rank, num_layers) for rank in range(num_stages)]
    bounds = first_layers(num_layers, num_stages)
    assert ends == list(itertools.pairwise(bounds))


@pytest.mark.parametrize(
    ("quantization", "tied"),
    [
        *((keys, False) for keys in (None, {}, {"quantize_lm_head": True}, {"quantize_embeddings": True})),
        *((keys, True) for keys in (None, {}, {"quantize_embeddings": True})),
    ],
)
def test_stages_are_the_model_together_and_the_head_is_with_the_last(
    quantization: dict[str, Any] | None, tied: bool
) -> None:
    config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
    whole = model_shape(config, None if quantization is None else FourfoldConfig(**quantization), 16)
    parts = stages(whole, 3)
    assert [len(part.blocks) for part in parts] == [2, 2, 1]
    assert [part.has_head for part in parts] == [False, False, True]
    assert sum(part.gradient_bytes for part in parts) == whole.gradient_bytes
    again = sum(whole.dense_ends) + whole.code_bytes - sum(whole.layer_codes) if tied else 0
    sizes = [part.dense_bytes + part.code_bytes for part in parts]
    assert sum(sizes) == pytest.approx(whole.dense_bytes + whole.code_bytes + again, abs=3)
    # Both ends have a matrix, in whatever bits, that the middle has not.
    assert sizes[0] > sizes[1]
    assert sizes[2] + sum(parts[0].layer_codes or parts[0].shardable_bytes) / 2 > sizes[1]


def test_a_stage_keeps_a_microbatch_for_each_stage_behind_it(full: ModelShape) -> None:
    assert [in_flight(stage, 4, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, 4, 2) == 2
    first = stages(full, 5)[0]
    few, many = (
        footprint(first, Step(1, 64, ["none"], accumulation=8, waiting=waiting, parallelism=Parallelism(5)))
        for waiting in (1, 4)
    )
    kept = sum(first.blocks[0].memory(1, 64, "none").kept().values())
    assert first.ends is not None
    assert many.moments["forward"] - few.moments["forward"] == 3 * (kept + first.ends.around(1, 64))


def test_a_pipeline_waits_while_it_fills_and_drains() -> None:
    gpu = replace(GPUS["h200"], peer_rate=1e9)
    # Narayanan et al., section 2.2.1: the bubble is (p - 1) / m of the ideal time.
    ideal = 8 * 2.0
    assert pipeline_seconds(gpu, 2.0, 0, num_stages=4, microbatches=8) / ideal - 1 == pytest.approx(3 / 8)
    assert pipeline_seconds(gpu, 2.0, 10**9, num_stages=4, microbatches=8) == pytest.approx(11 * 3.0)


def test_layers_whose_tensors_are_divided_sum_four_activations(qlora: ModelShape) -> None:
    # Shoeybi et al., section 3: two all-reduces in each pass. What is computed again is summed again.
    hidden = 2 * 64 * SIZES["hidden_size"]
    two = Parallelism(2, "tensor parallel")
    assert layer_reductions(qlora, two, 64, "none") == 4 * hidden
    assert layer_reductions(qlora, two, 64, "full") == 5 * hidden
    assert layer_reductions(qlora, Parallelism(4, "tensor parallel"), 64, "none") == 6 * hidden


def test_a_divided_model_has_its_share_of_weights_adapters_and_activations(qlora: ModelShape) -> None:
    part = with_divided_ends(model_shape(divided_config(LlamaConfig(**SIZES), 2), FourfoldConfig(), 16), 2)
    assert part.code_bytes * 2 == qlora.code_bytes
    assert part.dense_ends == tuple(size // 2 for size in qlora.dense_ends)
    # Of each adapter, one of the two factors is divided.
    assert 0.5 < part.num_adapter / qlora.num_adapter < 0.8
    kept = [sum(one.blocks[0].memory(1, 64, "none").kept().values()) for one in (part, qlora)]
    assert 0.5 < kept[0] / kept[1] < 0.7


@pytest.mark.parametrize(
    ("config", "degree", "expected"),
    [
        (LlamaConfig(**SIZES), 8, "2, 4 GPUs"),
        (Qwen2Config(**SIZES | {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 448}), 2, "one GPU"),
    ],
)
def test_heads_that_cannot_be_divided_are_refused_with_the_numbers_that_can(
    config: Any, degree: int, expected: str
) -> None:
    with pytest.raises(ConfigError, match="num_key_value_heads") as error:
        divided_config(config, degree)
    assert f"allowed: {expected}" in str(error.value)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="8 GPUs, 5 layers"):
        first_layers(5, 8)


def test_an_update_in_host_memory_is_shared_by_all_processes_and_takes_its_bytes() -> None:
    gpu = replace(GPUS["h200"], link_rate=1e10)
    one, two = (host_update_seconds(gpu, 10**9, 2 * 10**9, count) for count in (1, 2))
    # 28 bytes a number at 100 GB/s, and a share of gradients and weights over the link.
    assert one == pytest.approx(0.28 + 0.4)
    assert two == pytest.approx(0.28 + 0.2)


def test_the_fastest_that_is_trained_with_is_taken_before_a_faster_forecast(qlora: ModelShape) -> None:
    def plan(strategy: str) -> Any:
        optimizers = [OptimizerBytes("adamw", 8 * qlora.num_adapter)]
        ways = [Parallelism(2, strategy)]
        return make_plan(qlora, GPUS["h200"], rows=4, seq=64, optimizers=optimizers, parallelisms=ways)

    plans = {name: plan(name) for name in ("zero1", "pipeline parallel")}
    plans["pipeline parallel"] = replace(plans["pipeline parallel"], not_run="no")
    fast = replace(plans["pipeline parallel"].chosen, tokens_per_second=math.inf)
    plans["pipeline parallel"] = replace(plans["pipeline parallel"], chosen=fast)
    made = fastest_of(plans, {"tensor parallel": "no"})
    assert made.chosen is plans["zero1"].chosen
    assert made.by_strategy == plans
    assert made.to_dict()["refused"] == {"tensor parallel": "no"}


def test_zero_updates_by_adamw_alone(qlora: ModelShape) -> None:
    paged = [OptimizerBytes("paged_adamw_8bit", 0, host=2 * qlora.num_adapter)]
    for name, shards in STRATEGIES.items():
        options: dict[str, Any] = {"rows": 4, "seq": 64, "optimizers": paged, "parallelisms": [Parallelism(2, name)]}
        if shards.optimizers is None:
            assert make_plan(qlora, GPUS["h200"], **options).chosen is not None
        else:
            with pytest.raises(ConfigError, match="paged_adamw_8bit"):
                make_plan(qlora, GPUS["h200"], **options)


@pytest.mark.usefixtures("pretended")
def test_a_quantized_model_that_is_sharded_holds_what_is_foretold(qlora: ModelShape, tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(tmp_path)
    model = fourfold.load_model(str(tmp_path), quantization=FourfoldConfig(), dtype=torch.bfloat16)
    adapted = fourfold.prepare(model, LoraConfig(r=16, target_modules=list(default_target_modules("llama"))))
    shard_model(adapted, torch.device("cpu"))
    parts = held(qlora, Parallelism(2, "fsdp2")).parts
    names = ("weights, 16 bits", "weights, quantized", "quantization state", "adapters")
    assert held_bytes(adapted) == pytest.approx(sum(parts[name] for name in names), rel=1e-3)
