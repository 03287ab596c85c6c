"""The plan: what is chosen, and why the next faster one is not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from fourfold.errors import ConfigError
from fourfold.memory.footprint import Step, footprint
from fourfold.memory.gpus import GPUS, Gpu, gpu_by_name, parse_bytes, split_count
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.memory.planner import TIE, Candidate, OptimizerBytes, Plan, _Way, make_plan
from fourfold.memory.speed import MEMORY_SHARE, reduction_seconds, step_seconds, update_seconds
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.models.recomputation import POLICIES
from fourfold.quantization.hf_config import FourfoldConfig

GIB = 2**30
TINY: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 32000}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def shape(llama: Path) -> ModelShape:
    return model_shape(LlamaConfig.from_pretrained(llama), FourfoldConfig(), 16)


def planned(shape: ModelShape, gpu: Gpu, rows: int = 16, seq: int = 2048, **options: Any) -> Plan:
    optimizers = options.pop("optimizers", [OptimizerBytes("adamw_8bit", 86 * 2**20)])
    return make_plan(shape, gpu, rows=rows, seq=seq, optimizers=optimizers, **options)


def chosen_of(plan: Plan) -> Candidate:
    assert plan.chosen is not None
    return plan.chosen


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


def optimizers(shape: ModelShape) -> list[OptimizerBytes]:
    """32 bits on the GPU and paged, 8 bits likewise."""
    large, small = 8 * shape.num_adapter, 2 * shape.num_adapter
    return [
        OptimizerBytes("32", large),
        OptimizerBytes("paged 32", 0, staging=3 * 2**26, host=large),
        OptimizerBytes("8", small),
        OptimizerBytes("paged 8", 0, staging=3 * 2**26, host=small),
    ]


def test_the_more_exact_of_equally_fast_optimizers_is_taken_and_the_fastest_where_that_matters(
    shape: ModelShape,
) -> None:
    every, gpu = optimizers(shape), GPUS["h200"]
    assert chosen_of(planned(shape, gpu, optimizers=every)).optimizer == "32"
    assert chosen_of(planned(shape, gpu, optimizers=every[1:])).optimizer == "paged 32"
    # A link so slow that pages are waited for.
    slow = replace(gpu, link_rate=1e9)
    assert chosen_of(planned(shape, slow, optimizers=every[1:])).optimizer == "8"
    assert chosen_of(planned(shape, slow, optimizers=[every[1], every[3]])).optimizer == "paged 8"


@pytest.mark.parametrize(
    ("amount", "host", "expected"), [("24GB", None, "32"), ("10GB", None, "paged 32"), ("10GB", GIB, "8")]
)
def test_state_moves_to_the_host_before_it_loses_bits(
    shape: ModelShape, amount: str, host: int | None, expected: str
) -> None:
    state = OptimizerBytes("32", 4 * GIB), OptimizerBytes("paged 32", 0, 2**27, 4 * GIB), OptimizerBytes("8", GIB)
    options: dict[str, Any] = {"rows": 64, "host_bytes": host, "policies": ["full"], "batches": [1]}
    plan = planned(shape, gpu_by_name(amount), optimizers=state, **options)
    assert chosen_of(plan).optimizer == expected
    if expected == "paged 32":
        assert "paged 32 (4.00 GiB in host memory)" in "\n".join(plan.lines())


def test_an_update_takes_as_long_as_its_bytes_and_pages_go_both_ways_at_once() -> None:
    gpu = replace(GPUS["h200"], memory_rate=1e12, link_rate=1e10)
    resident = update_seconds(gpu, trained=100, state=1000)
    assert resident == pytest.approx((4 * 100 + 2 * 1000) / (1e12 * MEMORY_SHARE))
    assert update_seconds(gpu, trained=100, state=1000, paged=1000) == pytest.approx(1000 / 1e10)


def test_the_update_counts_once_in_a_step(shape: ModelShape) -> None:
    slow = replace(GPUS["h200"], link_rate=1e9)
    state = 8 * shape.num_adapter
    seconds = []
    for optimizer in (OptimizerBytes("a", 0), OptimizerBytes("b", 0, host=state)):
        plan = planned(shape, slow, optimizers=[optimizer], batches=[2], policies=["none"])
        assert chosen_of(plan).accumulation == 8
        seconds.append(chosen_of(plan).seconds)
    assert 0.9 * state / 1e9 < seconds[1] - seconds[0] <= state / 1e9


@pytest.mark.parametrize("parallelism", [ONE_GPU, Parallelism(2, "fsdp2")], ids=["one", "fsdp2"])
@pytest.mark.parametrize("graphs", [None, False])
@pytest.mark.parametrize("host", [None, 150 * 2**20])
@pytest.mark.parametrize("megabytes", [450, 700, 1500])
def test_no_candidate_of_all_that_there_are_is_faster_than_the_one_chosen(
    megabytes: int, host: int | None, graphs: bool | None, parallelism: Parallelism
) -> None:
    shape = model_shape(LlamaConfig(**TINY), FourfoldConfig(), 16)
    gpu = GPUS["rtx 4090"].with_usable(megabytes * 2**20)
    every = optimizers(shape)
    options = {"rows": 4, "seq": 1024, "host_bytes": host, "cuda_graphs": graphs, "parallelisms": [parallelism]}
    plan = planned(shape, gpu, optimizers=every, **options)
    layers, best = len(shape.blocks), 0.0
    step = Step(0, 1024, (), cuda_graphs=graphs)
    for optimizer in every:
        way = _Way(shape, gpu, 4, step, optimizer, parallelism)
        for batch, first, second in itertools.product(way.batches(None), POLICIES, POLICIES):
            ends = [way.candidate(batch, [name] * layers) for name in (first, second)]
            if ends[0].runs_by_graphs != ends[1].runs_by_graphs:
                continue
            for count in range(layers + 1):
                one = way.candidate(batch, [first] * (layers - count) + [second] * count)
                # Slower layers first, as the search has them.
                if plan.fits(one) and (ends[0].seconds >= ends[1].seconds or count in (0, layers)):
                    best = max(best, one.tokens_per_second)
    if plan.chosen is None:
        assert best == 0.0
    else:
        assert plan.fits(plan.chosen)
        assert plan.chosen.tokens_per_second >= best * (1 - TIE)


def test_long_rows_mix_layers_that_offload_with_such_that_do_not_where_host_memory_is_the_limit(
    shape: ModelShape,
) -> None:
    gpu = gpu_by_name("24GB")
    options: dict[str, Any] = {"rows": 1, "seq": 65536, "policies": ["full", "full_offload"]}
    every = chosen_of(planned(shape, gpu, **options, host_bytes=64 * GIB))
    assert every.recompute == "full_offload"
    assert planned(shape, gpu, **options | {"policies": ["full"]}).chosen is None
    mixed = chosen_of(planned(shape, gpu, **options, host_bytes=every.host_bytes - 1))
    assert set(mixed.policies) == {"full", "full_offload"}
    # As few in host memory as the GPU has room for is still a plan; less is none.
    lists = [["full"] * count + ["full_offload"] * (32 - count) for count in range(33)]
    held = [footprint(shape, Step(1, 65536, policies, optimizer_bytes=86 * 2**20)) for policies in lists]
    least = min(one.host_bytes for one in held if one.peak_bytes <= gpu.usable_bytes)
    assert chosen_of(planned(shape, gpu, **options, host_bytes=least)).host_bytes == least
    assert planned(shape, gpu, **options, host_bytes=least - 1).chosen is None


def test_long_rows_mix_layers_that_offload_with_faster_ones_that_do_not(shape: ModelShape) -> None:
    plan = planned(shape, GPUS["h200"], rows=1, seq=131072)
    offload = [POLICIES[name].offload for name in chosen_of(plan).policies]
    assert len(set(offload)) == 2
    uniform = [planned(shape, GPUS["h200"], rows=1, seq=131072, policies=[name]).chosen for name in POLICIES]
    assert chosen_of(plan).seconds < min(one.seconds for one in uniform if one)


def test_short_rows_do_not_give_up_graphs_for_a_mixture(shape: ModelShape) -> None:
    for amount in ("9GB", "10GB", "11GB", "12GB"):
        plan = planned(shape, gpu_by_name(amount), rows=4)
        offload = {POLICIES[name].offload for name in chosen_of(plan).policies}
        assert len(offload) == 1


def test_where_nothing_fits_the_smallest_way_is_named(shape: ModelShape) -> None:
    plan = planned(shape, gpu_by_name("4GB"))
    assert plan.chosen is None
    assert plan.smallest is not None
    assert plan.shortage(plan.smallest) > 0
    assert "nothing fits" in "\n".join(plan.lines())
    assert plan.to_dict()["chosen"] is None


def test_few_ways_are_looked_at_for_a_large_model_and_many_rows(llama_70b: Path) -> None:
    shape = model_shape(LlamaConfig.from_pretrained(llama_70b), FourfoldConfig(), 16)
    plan = make_plan(shape, gpu_by_name("48GB"), rows=64, seq=4096, optimizers=[OptimizerBytes("adamw", GIB)])
    assert 7 * 7 <= plan.num_tried < 200


def test_a_step_takes_longer_the_more_is_computed_again(shape: ModelShape) -> None:
    order = ["none", "mlp", "selective", "full"]
    seconds = [step_seconds(shape, GPUS["h200"], 4, 2048, [policy] * 32) for policy in order]
    assert seconds == sorted(seconds)
    slow_link = replace(GPUS["h200"], link_rate=1e9)
    assert step_seconds(shape, slow_link, 4, 2048, ["mlp_offload"] * 32) > 2 * seconds[1]


def test_a_large_base_streams_through_a_small_gpu_as_fast_as_the_link_allows(llama_70b: Path) -> None:
    shape = model_shape(LlamaConfig.from_pretrained(llama_70b), FourfoldConfig(), 16)
    gpu = gpu_by_name("24GB")
    assert planned(shape, gpu, rows=1).chosen is None
    chosen = planned(shape, gpu, rows=1, streams="host").chosen
    assert chosen is not None
    over_the_link = 2 * sum(shape.layer_bytes) / gpu.link_rate
    assert over_the_link < chosen.seconds
    slow = planned(shape, replace(gpu, link_rate=2e9), rows=1, streams="host").chosen
    assert slow is not None
    assert 2 * sum(shape.layer_bytes) / 2e9 < slow.seconds < 1.2 * 2 * sum(shape.layer_bytes) / 2e9


def test_several_gpus_part_rows_and_state_and_say_what_passes_between_them(shape: ModelShape) -> None:
    four = [Parallelism(4, name) for name in ("ddp", "fsdp2")]
    state = [OptimizerBytes("adamw", 8 * shape.num_adapter)]
    one = chosen_of(planned(shape, GPUS["h200"], rows=16, optimizers=state))
    whole, sharded = (chosen_of(planned(shape, GPUS["h200"], optimizers=state, parallelisms=[way])) for way in four)
    for made in (whole, sharded):
        assert made.batch * made.accumulation * 4 == 16
        assert 3 < made.tokens_per_second / one.tokens_per_second < 4
    gradients = 4 * shape.num_adapter
    assert whole.footprint.parts["optimizer state"] == one.footprint.parts["optimizer state"]
    assert sharded.footprint.parts["optimizer state"] * 4 == one.footprint.parts["optimizer state"]
    assert whole.footprint.parts["buckets of gradients"] == gradients
    assert sharded.footprint.parts["buckets of gradients"] == 4 * shape.blocks[0].gradient_bytes // 4
    assert whole.traffic == {"gradients reduced": 2 * gradients * 3 // 4}
    # The codes and adapters of layers twice, embedding and head once.
    passed = 2 * (sum(shape.shardable_bytes) + gradients) + 2 * 2 * 128256 * 4096
    assert sharded.traffic == {"weights gathered": passed * 3 // 4, "gradients scattered": gradients * 3 // 4}
    both = planned(shape, GPUS["h200"], optimizers=state, parallelisms=four)
    told = "\n".join(both.lines())
    assert "plan for 4 x H200" in told
    assert "to and from each GPU in a step" in told
    assert both.to_dict()["chosen"]["num_gpus"] == 4


def test_of_equally_fast_ways_to_share_a_run_the_simpler_is_taken_and_sharding_where_only_that_fits(
    shape: ModelShape,
) -> None:
    two = [Parallelism(2, name) for name in ("ddp", "fsdp2")]
    for usable, expected in ((80 * GIB, "ddp"), (6 * GIB, "fsdp2")):
        plan = planned(shape, GPUS["h200"].with_usable(usable), parallelisms=two)
        assert chosen_of(plan).parallelism.strategy == expected


def test_reducing_gradients_is_waited_for_where_it_outlasts_the_backward_pass() -> None:
    slow = replace(GPUS["h200"], peer_rate=1e9)
    two, gradients = Parallelism(2), 10**9
    assert reduction_seconds(slow, gradients, two, microbatch=4.0) == 0
    assert reduction_seconds(slow, gradients, two, microbatch=1.0) == pytest.approx(0.5)
    assert reduction_seconds(slow, gradients, ONE_GPU, microbatch=0.0) == 0


def test_gathered_layers_are_waited_for_over_a_slow_link(shape: ModelShape) -> None:
    policies = ["none"] * 32

    def seconds(gpu: Gpu, parallelism: Parallelism) -> float:
        return step_seconds(shape, gpu, 1, 2048, policies, by_graphs=True, parallelism=parallelism)

    sharded, ends = Parallelism(2, "fsdp2"), 2 * 2 * 128256 * 4096
    # Layers come beside the work; embedding and head are waited for.
    waited = ends / 2 / GPUS["h200"].peer_rate
    assert seconds(GPUS["h200"], sharded) - seconds(GPUS["h200"], ONE_GPU) == pytest.approx(waited)
    slow = replace(GPUS["h200"], peer_rate=2e9)
    passed = (2 * sum(shape.shardable_bytes) + 3 * 4 * shape.num_adapter + ends) / 2
    assert seconds(slow, sharded) == pytest.approx(passed / 2e9, rel=0.01)
    # Without a link of their own, GPUs speak over that to the host.
    assert seconds(replace(slow, peer_rate=None, link_rate=2e9), sharded) == seconds(slow, sharded)


def test_host_memory_is_that_of_all_gpus_processes(shape: ModelShape) -> None:
    options: dict[str, Any] = {"rows": 2, "seq": 65536, "policies": ["full_offload"], "batches": [1]}
    alone = chosen_of(planned(shape, GPUS["l40s"], **options))
    two = {"parallelisms": [Parallelism(2)]}
    assert chosen_of(planned(shape, GPUS["l40s"], **options, **two)).host_bytes == 2 * alone.host_bytes
    refused = planned(shape, GPUS["l40s"], **options, **two, host_bytes=alone.host_bytes)
    assert refused.chosen is None
    assert "more of host memory" in "\n".join(refused.lines())


def test_rows_that_cannot_be_parted_among_the_gpus_are_refused(shape: ModelShape) -> None:
    with pytest.raises(ConfigError, match="16 rows, 3 GPUs"):
        planned(shape, GPUS["h200"], parallelisms=[Parallelism(3)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2xH200", (2, "H200")), ("4 x 24GB", (4, "24GB")), ("8X RTX 4090", (8, "RTX 4090")), ("24GB", (1, "24GB"))],
)
def test_several_gpus_are_named_by_their_number(text: str, expected: tuple[int, str]) -> None:
    assert split_count(text) == expected


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


def test_where_each_kernel_is_launched_a_short_step_waits_for_the_host(shape: ModelShape) -> None:
    def seconds(batch: int, by_graphs: bool) -> float:
        return step_seconds(shape, GPUS["h200"], batch, 512, ["selective"] * 32, by_graphs=by_graphs)

    assert seconds(1, by_graphs=False) > 1.5 * seconds(1, by_graphs=True)
    assert seconds(32, by_graphs=False) == seconds(32, by_graphs=True)
