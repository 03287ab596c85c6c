"""Fused blocks replayed as CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import adapted, decoder, distance, ids, loss_and_grads
from peft import LoraConfig, PeftModel
from torch.profiler import ProfilerActivity, profile

from fourfold.models.block import FusedDecoderLayer, set_recomputation
from fourfold.models.graphs import BlockGraphs

pytestmark = pytest.mark.gpu

# cuDNN's backward pass of the attention sums in no fixed order.
ORDER_OF_SUMS = 3e-3
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64}


def model(name: str = "qwen3-head-norms", recompute: str = "none", graphs: bool = True) -> PeftModel:
    from fourfold.models.block import fuse_blocks

    made = adapted(decoder(name, torch.bfloat16, device="cuda", **SIZES), fused=True, recompute=recompute, r=8)
    fuse_blocks(made.get_base_model(), recompute, cuda_graphs=graphs)
    return made


def graphs_of(made: PeftModel) -> BlockGraphs:
    return next(layer._graphs for layer in made.modules() if isinstance(layer, FusedDecoderLayer))


def batch(seed: int, shape: tuple[int, int] = (2, 128)) -> torch.Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("llama-gqa", "none"),
        ("llama-gqa", "mlp"),
        ("llama-gqa", "selective"),
        ("llama-gqa", "full"),
        ("qwen2-biases", "full"),
        ("qwen3-head-norms", "selective"),
        ("smollm3-no-rope", "mlp"),
        ("mistral-window", "none"),
    ],
)
def test_replayed_passes_give_what_launched_ones_give_on_every_batch(name: str, recompute: str) -> None:
    replayed, launched = model(name, recompute), model(name, recompute, graphs=False)
    for step in range(6):
        tokens = batch(step)
        ours, theirs = (loss_and_grads(each, input_ids=tokens) for each in (replayed, launched))
        assert torch.equal(ours[0], theirs[0])
        assert distance(ours[1], theirs[1]) < ORDER_OF_SUMS
        # As an optimizer would, in place.
        with torch.no_grad():
            for each, (_, grads) in ((replayed, ours), (launched, ours)):
                for key, parameter in each.named_parameters():
                    if key in grads:
                        parameter -= 0.1 * grads[key].to(parameter.dtype)
    assert graphs_of(replayed)._replays == 4 * 2


def test_layers_of_different_policies_are_replayed_and_another_choice_frees_their_memory() -> None:
    replayed, launched = model(), model(graphs=False)
    names = ["selective", "none"]
    for made in (replayed, launched):
        set_recomputation(made, names)
    for step in range(5):
        tokens = batch(step)
        ours, theirs = (loss_and_grads(each, input_ids=tokens) for each in (replayed, launched))
        assert torch.equal(ours[0], theirs[0])
        assert distance(ours[1], theirs[1]) < ORDER_OF_SUMS
    assert len(graphs_of(replayed)._graphs) == len(names)
    set_recomputation(replayed, names)
    assert len(graphs_of(replayed)._graphs) == len(names)
    set_recomputation(replayed, "full")
    assert not graphs_of(replayed)._graphs


@pytest.mark.parametrize("frozen", ["layers.1.", "layers.0.", "layers.1.self_attn", "lora_A"])
def test_frozen_adapters_get_no_gradient_from_a_replay(frozen: str) -> None:
    replayed, launched = model(), model(graphs=False)
    for each in (replayed, launched):
        for key, parameter in each.named_parameters():
            if frozen in key:
                parameter.requires_grad_(False)
    for step in range(5):
        tokens = batch(step)
        ours, theirs = (loss_and_grads(each, input_ids=tokens) for each in (replayed, launched))
        assert torch.equal(ours[0], theirs[0])
        assert distance(ours[1], theirs[1]) < ORDER_OF_SUMS
    assert graphs_of(replayed)._replays


def test_gradients_of_several_microbatches_add_up() -> None:
    replayed, launched = model(), model(graphs=False)
    for _ in range(4):
        loss_and_grads(replayed, input_ids=batch(0))
    totals = []
    for each in (replayed, launched):
        each.zero_grad(set_to_none=True)
        for seed in (1, 2, 3):
            each(input_ids=batch(seed), use_cache=False).logits.float().logsumexp(-1).mean().backward()
        totals.append({key: value.grad.double() for key, value in each.named_parameters() if value.grad is not None})
    assert distance(*totals) < ORDER_OF_SUMS


def test_two_forward_passes_before_their_backward_passes_are_both_right() -> None:
    replayed, launched = model(), model(graphs=False)
    for _ in range(4):
        loss_and_grads(replayed, input_ids=batch(0))
    totals = []
    for each in (replayed, launched):
        each.zero_grad(set_to_none=True)
        losses = [each(input_ids=batch(seed), use_cache=False).logits.float().logsumexp(-1).mean() for seed in (1, 2)]
        (losses[0] + 2 * losses[1]).backward()
        totals.append({key: value.grad.double() for key, value in each.named_parameters() if value.grad is not None})
    assert distance(*totals) < ORDER_OF_SUMS


def test_other_shapes_run_without_and_other_adapters_are_captured_anew() -> None:
    replayed, launched = model(), model(graphs=False)
    for each in (replayed, launched):
        each.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        torch.manual_seed(1)
        for key, parameter in each.named_parameters():
            if "second" in key:
                parameter.data.normal_(std=0.05)
    plan = [("default", (2, 128))] * 4 + [("default", (1, 64))] + [("default", (2, 128))] + [("second", (2, 128))] * 6
    for step, (adapter, shape) in enumerate(plan):
        results = []
        for each in (replayed, launched):
            each.set_adapter(adapter)
            results.append(loss_and_grads(each, input_ids=batch(step, shape)))
        assert torch.equal(results[0][0], results[1][0])
        assert distance(results[0][1], results[1][1]) < ORDER_OF_SUMS
    assert graphs_of(replayed)._graphs


def test_a_second_backward_pass_is_refused() -> None:
    replayed = model()
    for _ in range(4):
        loss_and_grads(replayed, input_ids=batch(0))
    loss = replayed(input_ids=batch(1), use_cache=False).logits.float().mean()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward pass twice"):
        loss.backward()


def test_the_host_launches_a_fraction_of_what_it_launched() -> None:
    def launches(each: PeftModel) -> int:
        for _ in range(4):
            loss_and_grads(each, input_ids=batch(0))
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            loss_and_grads(each, input_ids=batch(0))
        return sum(
            event.count
            for event in trace.key_averages()
            if event.key in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")
        )

    assert launches(model()) < 0.5 * launches(model(graphs=False))


def test_long_batches_run_without_unless_asked_for() -> None:
    made = adapted(decoder("llama-gqa", torch.bfloat16, device="cuda", **SIZES), fused=True, r=8)
    graphs = graphs_of(made)
    graphs.max_tokens = 100
    for _ in range(4):
        loss_and_grads(made, input_ids=ids(2, 64, device="cuda"))
    assert graphs._replays == 0
