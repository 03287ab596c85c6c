"""The footprint against what training steps took on a GPU, and against tensors that are there."""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from fourfold.kernels.low_rank import new_extended
from fourfold.memory.footprint import Footprint, Step, footprint
from fourfold.memory.gpus import GPUS
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.memory.speed import step_seconds
from fourfold.models.block_memory import BlockMemory
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.models.recomputation import POLICIES
from fourfold.optimizers.footprint import state_bytes
from fourfold.quantization.hf_config import FourfoldConfig

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
}


def shape_of(name: str, rank: int = 16) -> ModelShape:
    config = LlamaConfig(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, **SHAPES[name])
    return model_shape(config, FourfoldConfig(), rank)


def recorded() -> list[tuple[str, dict[str, Any], int]]:
    """Setting and peak of every training step of ours that was measured beside the peers'."""
    found = []
    for name in ("end_to_end", "end_to_end_policies", "end_to_end_long_row"):
        for key, row in json.loads((RESULTS / f"{name}.json").read_text())["results"].items():
            for run in row["systems"]["fourfold"]:
                found.append((key, row["setting"], int(run["peak_gib"] * 2**30)))
    return found


@pytest.mark.parametrize(("name", "setting", "peak"), recorded(), ids=[row[0] for row in recorded()])
def test_peaks_that_were_measured_on_a_gpu_are_foretold_within_1_percent(
    name: str, setting: dict[str, Any], peak: int
) -> None:
    shape = shape_of(setting["shape"])
    policies = [setting["policy"]] * len(shape.blocks)
    step = Step(
        setting["batch"], setting["seq"], policies, optimizer_bytes=state_bytes("adamw", 8, shape.adapter_shapes)
    )
    assert abs(footprint(shape, step).peak_bytes / peak - 1) < 0.01


def test_steps_that_were_measured_on_an_h200_are_foretold_within_5_percent() -> None:
    for name in ("end_to_end", "end_to_end_policies", "end_to_end_long_row"):
        for key, row in json.loads((RESULTS / f"{name}.json").read_text())["results"].items():
            setting, shape = row["setting"], shape_of(row["setting"]["shape"])
            policies = [setting["policy"]] * len(shape.blocks)
            batch, seq = setting["batch"], setting["seq"]
            by_graphs = Step(batch, seq, policies).runs_by_graphs
            foretold = step_seconds(shape, GPUS["h200"], batch, seq, policies, by_graphs=by_graphs)
            for run in row["systems"]["fourfold"]:
                assert abs(foretold / statistics.median(run["step_seconds"]) - 1) < 0.05, key


@pytest.mark.parametrize("policy", POLICIES)
def test_parts_add_up_to_the_highest_moment(policy: str) -> None:
    shape = shape_of("8b")
    held = footprint(shape, Step(2, 1024, [policy] * 32, optimizer_bytes=1000, staging_bytes=77, eval_batch=8))
    assert held.peak_bytes == max(held.moments.values()) == held.moments[held.moment]
    assert sum(held.detail.values()) == held.parts["working memory"]
    assert bool(held.host) == POLICIES[policy].offload


def test_layers_that_keep_less_take_less_and_a_mixture_lies_between() -> None:
    shape = shape_of("8b")

    def peak(*policies: str) -> int:
        return footprint(shape, Step(1, 4096, policies)).peak_bytes

    none, full = peak(*["none"] * 32), peak(*["full"] * 32)
    mixed = peak(*["full"] * 16, *["none"] * 16)
    assert full < peak(*["selective"] * 32) < peak(*["mlp"] * 32) < none
    assert full < mixed < none


def test_extended_tensors_take_what_their_formula_says() -> None:
    block = shape_of("8b").blocks[0]
    kept = BlockMemory(block, 64, "none").kept()
    made = new_extended(torch.empty(0, dtype=torch.bfloat16), 64, 2 * block.intermediate, block.gate_up_rank)
    assert kept["gate_up"] == made.untyped_storage().nbytes()


def test_a_large_batch_of_evaluation_can_be_the_peak() -> None:
    shape = shape_of("1b")
    small = Step(1, 2048, ["full"] * 16, cuda_graphs=False)
    large = Step(1, 2048, ["full"] * 16, cuda_graphs=False, eval_batch=64)
    assert footprint(shape, small).moment != "evaluation"
    assert footprint(shape, large).moment == "evaluation"


def test_layers_that_stream_leave_a_ring_on_the_gpu_and_themselves_in_host_memory() -> None:
    shape = shape_of("8b")
    stays = footprint(shape, Step(1, 2048, ["full"] * 32, cuda_graphs=False))
    streams = footprint(shape, Step(1, 2048, ["full"] * 32, streams="host"))
    ring = streams.parts["layers on their way"]
    assert ring == 3 * max(shape.layer_bytes)
    saved = shape.code_bytes + shape.scale_bytes
    assert stays.peak_bytes - streams.peak_bytes == saved - ring
    assert saved <= streams.host["weights"] < 1.01 * saved
    from_disk = footprint(shape, Step(1, 2048, ["full"] * 32, streams="disk"))
    assert from_disk.peak_bytes == streams.peak_bytes
    assert from_disk.host["weights"] < streams.host["weights"] / 4


def test_paged_state_leaves_its_pages_on_the_gpu() -> None:
    shape = shape_of("8b")
    held = footprint(shape, Step(1, 2048, ["full"] * 32, staging_bytes=1000, host_optimizer_bytes=5000))
    assert held.parts["pages of optimizer state"] == 1000
    assert held.host["optimizer state"] == 5000


def test_where_layers_keep_little_gradients_that_grow_make_the_first_layers_the_highest() -> None:
    shape = shape_of("8b", rank=64)
    held = footprint(shape, Step(2, 8192, ["full_offload"] * 32))
    assert held.moment == "backward"
    assert held.parts["gradients"] > 0.9 * 4 * shape.num_adapter
    kept = footprint(shape, Step(2, 8192, ["none"] * 32))
    assert kept.parts["gradients"] < 0.1 * 4 * shape.num_adapter


def test_graphs_hold_gradients_of_their_own() -> None:
    shape = shape_of("8b")
    held = footprint(shape, Step(1, 2048, ["mlp"] * 32))
    assert held.parts["gradients in graphs"] == 4 * shape.num_adapter
    without = footprint(shape, Step(1, 2048, ["mlp"] * 32, cuda_graphs=False))
    assert "gradients in graphs" not in without.parts
    assert without.peak_bytes < held.peak_bytes


def held_beside(policies: list[str], sizes: list[int]) -> tuple[list[int], list[int]]:
    """Bytes of other layers' offloaded tensors on the GPU while each layer is at work, forward and backward: what
    `recomputation.HostOffload` does, call by call."""
    on_gpu: set[int] = set()
    leaving: list[int] = []
    forward, backward = [], []
    saved = [index for index, policy in enumerate(policies) if POLICIES[policy].offload]
    for index in range(len(policies)):
        forward.append(sum(sizes[other] for other in on_gpu))
        if index in saved:
            while len(leaving) >= 2:
                on_gpu.remove(leaving.pop(0))
            leaving.append(index)
            on_gpu.add(index)
    for index in reversed(range(len(policies))):
        if index in saved:
            on_gpu.add(index)
            on_gpu |= {max((other for other in saved if other < index), default=index)}
        backward.append(sum(sizes[other] for other in on_gpu if other != index))
        on_gpu.discard(index)
    return forward, backward[::-1]


@pytest.mark.parametrize(
    "policies",
    [
        ["full_offload"] * 6,
        ["full"] * 3 + ["full_offload"] * 3,
        ["selective_offload"] * 3 + ["none"] * 3,
        ["full_offload", "none", "mlp_offload", "none", "none", "none"],
        ["none", "full_offload", "none", "selective_offload", "mlp", "full_offload"],
        ["full_offload"] + ["selective"] * 5,
    ],
)
def test_of_mixed_lists_the_layers_in_flight_are_those_that_offload(policies: list[str]) -> None:
    shape = replace(shape_of("1b"), blocks=shape_of("1b").blocks[:6], layer_bytes=shape_of("1b").layer_bytes[:6])
    tokens = 16384
    blocks = [BlockMemory(block, tokens, policy) for block, policy in zip(shape.blocks, policies, strict=True)]
    sizes = [sum(block.offloaded().values()) for block in blocks]
    stay = [sum(block.kept().values()) - size for block, size in zip(blocks, sizes, strict=True)]
    beside = held_beside(policies, sizes)
    held = footprint(shape, Step(1, tokens, policies))
    standing = sum(held.parts[part] for part in ("weights, 16 bits", "weights, quantized", "quantization state"))
    standing += held.parts["adapters"] + held.parts["libraries"]
    hidden = tokens * shape.hidden_size * 2
    forward, backward = [], []
    for index, block in enumerate(blocks):
        x_is_gone = index and POLICIES[policies[0]].offload and len([size for size in sizes[1:index] if size]) >= 2
        work = max(sum(moment.values()) for moment in block.forward_moments())
        forward.append(sum(stay[:index]) + beside[0][index] + work + (hidden if x_is_gone else 0))
        sums = 4 * block.shape.adapter_parameters
        work = max(sum(moment.values()) for moment in block.backward_moments()) - sums
        gradients = sums * (len(blocks) - index)
        last = hidden if index == 5 else 0
        backward.append(sum(stay[:index]) + beside[1][index] + work + gradients + last)
    assert held.moments["forward"] - standing == max(forward)
    assert held.moments["backward"] - standing == max(backward)


def test_sharded_gpus_hold_their_share_and_the_layers_at_work() -> None:
    shape = shape_of("8b")

    def held(parallelism: Parallelism) -> Footprint:
        return footprint(shape, Step(1, 2048, ["full"] * 32, cuda_graphs=False, parallelism=parallelism))

    one, two, sharded = held(ONE_GPU), held(Parallelism(2)), held(Parallelism(2, "fsdp2"))
    assert two.peak_bytes - one.peak_bytes == 4 * shape.num_adapter
    layer = shape.shardable_bytes[0] + 4 * shape.blocks[0].adapter_parameters
    assert sharded.parts["layers on their way"] == 2 * layer
    assert sharded.parts["adapters"] == 2 * shape.num_adapter
    # Norms stay whole.
    ends = 2 * 2 * 128256 * 4096
    assert sharded.parts["weights, 16 bits"] == one.parts["weights, 16 bits"] - ends / 2
    assert sharded.parts["weights, quantized"] == one.parts["weights, quantized"] / 2
    assert sharded.parts["quantization state"] == one.parts["quantization state"] / 2


def test_sharded_weights_of_16_bits_are_parted_but_for_norms() -> None:
    config = LlamaConfig(vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, **SHAPES["8b"])
    shape = model_shape(config, None, 16)
    held = footprint(shape, Step(1, 2048, ["full"] * 32, parallelism=Parallelism(8, "fsdp2")))
    norms = 65 * 4096
    assert held.parts["weights, 16 bits"] == 2 * (norms + (shape.num_parameters - norms) / 8)
    assert "weights, quantized" not in held.parts
